"""The weights of a model directory as their files describe them: headers are read without torch, before anything is loaded.

A safetensors file is 8 bytes with the length of a JSON header, the header (name, dtype, shape and place of every tensor), the
data (https://huggingface.co/docs/safetensors). Large models are cut into shards that `model.safetensors.index.json` lists.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the same bound as in the safetensors library."""
_POINTER = b"version https://git-lfs"


class TensorHeader(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    """As safetensors writes it: `F32`, `BF16`, …"""
    shape: tuple[int, ...]


def refuse_pointer(path: Path) -> None:
    """Raises UserError when a file is what Git LFS leaves in the place of one that was not downloaded; an absent file is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(400)
    if head.startswith(_POINTER):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        real = f" of {int(size[1]):,} bytes" if size else ""
        raise UserError(f"{path}: a Git LFS pointer in place of the file{real}: run git lfs pull where it was cloned")


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Returns {name: dtype and shape} of every tensor in a safetensors file.

    Raises:
        UserError: a Git LFS pointer, another format, or a file whose end is missing.
    """
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, MAX_HEADER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if size < 8 or not text.startswith(b"{"):
        raise UserError(f"{path}: {'truncated: only ' + str(size) + ' bytes' if size < 9 else 'not a safetensors file'}")
    if len(text) < length:
        raise UserError(f"{path}: truncated: {size:,} bytes end within its header: copy or download it again")
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: TensorHeader(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: not a safetensors file (its header is damaged): copy or download it again") from None
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise UserError(f"{path}: {what}: {size:,} of {end:,} bytes: copy or download it again")
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """Returns the files of a model's weights: one, or all shards of an index.

    Raises:
        UserError: there are none, only pickled ones, or a shard is missing.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        lost = [name for name in names if not (directory / name).is_file()]
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UserError(f"{directory}: shard {lost[0]}{more} of {len(names)} is missing: copy or download it again")
        return [directory / name for name in names]
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        raise UserError(f"{directory}: only pickled weights ({pickles[0]}), which can run code: convert them to safetensors")
    raise UserError(f"{directory}: a model directory without weights (no {WEIGHTS})")


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Returns {name: dtype and shape} of every tensor of a model directory; see `weight_files` and `read_header`.

    Raises:
        UserError: weights that are missing, incomplete or damaged.
    """
    files = weight_files(directory)
    tensors = {name: tensor for path in files for name, tensor in read_header(path).items()}
    if files[0].name != WEIGHTS:
        for name, shard in _weight_map(directory / INDEX).items():
            if name not in tensors:
                raise UserError(f"{directory / shard}: no tensor '{name}', which {INDEX} says is there: download it again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    refuse_pointer(index)
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not shards or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise ValueError("no shards beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards ({error}): copy or download it again") from None
    return shards
