"""The bundle's manifest: what is served, and the SHA-256 of every file. Read strictly: a bundle may come from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from engine.config import Strict
from engine.errors import UserError
from engine.stages.stage import STAGE_FILE, sha256
from export.engines import Weights

FORMAT = 2
MANIFEST = "manifest.json"
UNLISTED = frozenset({MANIFEST, STAGE_FILE})
"""Files of a bundle that its manifest does not list: itself, and the record of the stage that made it."""


def _inside(path: str) -> str:
    if path != str(PurePosixPath(path)) or path in ("", ".") or path.startswith("/") or ".." in path.split("/") or "\\" in path:
        raise ValueError(f"'{path}' is not a plain path inside the bundle")
    return path


InnerPath = Annotated[str, AfterValidator(_inside)]
"""A relative path, written with '/', that stays inside the bundle."""


Runtime = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
"""What runs an engine; `onnxruntime` is in every bundle."""


class FileEntry(Strict):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class EngineEntry(Strict):
    """One engine of the bundle."""

    file: InnerPath
    weights: Weights | None = None
    """Form of its int8 weights; None: it computes with floats."""


class TensorEntry(Strict):
    """One input or output of a graph."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")
    dtype: Literal["int64", "float32"]
    shape: list[int | str]
    """Sizes of the axes, the name of one that varies; the first is the batch."""


class GraphEntry(Strict):
    """One graph of the bundle, in each of its runtimes."""

    inputs: list[TensorEntry] = Field(min_length=1)
    outputs: list[TensorEntry] = Field(min_length=1)
    engines: dict[Runtime, EngineEntry]


class BundleTask(Strict):
    """What the bundle answers: the name of an answering half, and what it has to know."""

    type: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    facts: dict[str, Any]


class OutputTolerance(Strict):
    """How far an output may move on the golden inputs. The same machine gives the same bits."""

    golden: float = Field(ge=0)
    """Largest |output - golden output|: another CPU or release of the runtime rounds differently."""
    invariance: float = Field(ge=0)
    """Largest change of a row's output by its neighbours in the batch or by padding."""
    reference: float = Field(ge=0)
    """Largest |output - output of the fp32 model that the engine came from|."""


class Tolerance(Strict):
    """How far a bundle may stray on its golden inputs before it is refused."""

    outputs: dict[str, OutputTolerance]
    """By `graph/output`."""
    agreement: float = Field(ge=0, le=1)
    """How far the answers must be those of the fp32 model, and those at export: the share of golden inputs, for classes."""


class Manifest(Strict):
    """manifest.json."""

    format: Literal[2]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    task: BundleTask
    max_length: int = Field(ge=1)
    max_batch: int = Field(ge=1)
    graphs: dict[str, GraphEntry] = Field(min_length=1)
    weight_bytes: int = Field(ge=0)
    """Bytes of the constants of the ONNX engines."""
    parity: dict[str, Any]
    benchmark: dict[str, Any]
    versions: dict[str, str]
    instructions: list[str]
    """Vector instructions of the CPU that the golden outputs and the benchmark were made on, see engine.cpu."""
    provenance: dict[str, Any]
    tolerance: Tolerance
    files: dict[InnerPath, FileEntry]

    @model_validator(mode="after")
    def _names_listed_files(self) -> Manifest:
        for name, graph in self.graphs.items():
            if "onnxruntime" not in graph.engines:
                raise ValueError(f"graph '{name}' has no engine 'onnxruntime': every bundle holds the embedded engine")
            for entry in graph.engines.values():
                if entry.file not in self.files:
                    raise ValueError(f"the engine file '{entry.file}' is not among files")
        return self

    @property
    def runtimes(self) -> list[Runtime]:
        """What runs every graph."""
        return [
            name for name in self.graphs[next(iter(self.graphs))].engines if all(name in g.engines for g in self.graphs.values())
        ]


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Reads a bundle's manifest.

    Returns:
        (manifest, SHA-256 of manifest.json: the identity of the whole bundle).

    Raises:
        UserError: not a bundle, another format, or a manifest that is damaged.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such bundle")
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{directory}: not a bundle (no {MANIFEST}): name the directory of an export stage")
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}): copy the bundle again or export it anew") from None
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise UserError(f"{path}: bundle format {version!r}, and this version reads format {FORMAT}: export the bundle anew")
    try:
        return Manifest.model_validate(data), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        worst = error.errors()[0]
        where = ".".join(str(part) for part in worst["loc"]) or "manifest"
        message = worst["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {where}: {message}: copy the bundle again or export it anew") from None


def _walk(directory: Path, folders: set[str], inner: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yields every entry below `directory` but those of `folders`, whose own entries it yields; no link is followed."""
    with os.scandir(directory / inner) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            name = f"{inner}/{entry.name}".lstrip("/")
            if entry.is_dir(follow_symlinks=False) and name in folders:
                yield from _walk(directory, folders, name)
            else:
                yield name, entry


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compares every file of a bundle with its manifest, cheapest check first.

    Raises:
        UserError: the first file that is linked, not listed, missing, or of another size or SHA-256; the first folder without a
            listed file.
    """
    present = dict(_walk(directory, {str(folder) for name in manifest.files for folder in PurePosixPath(name).parents}))
    for name, entry in present.items():
        if entry.is_dir(follow_symlinks=False):
            raise UserError(f"{directory / name}: a folder that {MANIFEST} has no file of: no part of the bundle, remove it")
        if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            kind = "a symbolic link" if entry.is_symlink() else "not a plain file"
            raise UserError(f"{directory / name}: {kind}: a bundle holds plain files only; copy the bundle again")
        if name not in manifest.files and name not in UNLISTED:
            raise UserError(f"{directory / name}: not listed in {MANIFEST}: no part of the bundle, remove it")
    for name, listed in manifest.files.items():
        if name not in present:
            raise UserError(f"{directory / name}: missing, though {MANIFEST} lists it: copy the bundle again")
        size = present[name].stat(follow_symlinks=False).st_size
        if size != listed.bytes:
            raise UserError(f"{directory / name}: {size:,} bytes instead of {listed.bytes:,}: copy the bundle again")
    for name, listed in manifest.files.items():
        if sha256(directory / name) != listed.sha256:
            raise UserError(f"{directory / name}: its SHA-256 is not that of {MANIFEST}: copy the bundle again or export it anew")


def read_file(directory: Path, manifest: Manifest, name: str) -> bytes:
    """Returns the bytes of a listed file; what was checked is what is used.

    Raises:
        UserError: not listed, unreadable, or not the bytes that the manifest lists.
    """
    path = directory / name
    if name not in manifest.files:
        raise UserError(f"{path}: {MANIFEST} does not list it: export the bundle anew")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): copy the bundle again") from None
    if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
        raise UserError(f"{path}: its SHA-256 is not that of {MANIFEST}: copy the bundle again or export it anew")
    return data
