"""The contract of every stage: it reads directories and writes one, which is complete or absent.

While a stage runs it owns `runs/<recipe>/<stage>.partial/` (checkpoints, logs, `output/`). When it is done `output/` gets a
`stage.json` with the hash of every file, is flushed to disk and renamed to `runs/<recipe>/<stage>/`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic

from engine.config import STAGE_FILE, ModelRef, Recipe, Section, load_recipe, references
from engine.cpu import instructions
from engine.errors import UserError, did_you_mean
from engine.hashes import input_sha256, sha256
from engine.stages.rank import run_rank

WORK_FILE = "work.json"
"""In the working directory of a stage: what the run that it belongs to is."""
SHARED = ".shared"
"""In the run directory, until every stage that trains has finished: what several stages make alike."""


def hash_directory(
    directory: Path,
    skip: tuple[str, ...] = (),
    sha256: Callable[[Path], str] = sha256,
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Returns {relative path: {"sha256", "bytes"}} of every file below `directory`, sorted by path; `known` ones are not read."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    return {
        name: known.get(name) or {"sha256": sha256(path), "bytes": path.stat().st_size}
        for name, path in names.items()
        if name not in skip
    }


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def flush(directory: Path) -> None:
    """Forces every file and directory entry below `directory` to disk (fsync)."""
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(source: Path, target: Path) -> None:
    """Renames a finished directory into place; a directory already there is replaced as a whole.

    Between the two renames `target` may be absent for an instant; it is never half of one and half of the other.
    """
    flush(source)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    flush_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def made_once(directory: Path, make: Callable[[Path], None]) -> None:
    """Makes a directory that is complete or absent, unless it is there already; another process may make the same one meanwhile.

    Args:
        make: fills the directory that it is given.
    """
    if directory.exists():
        return
    part = directory.with_name(f"{directory.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        make(part)
        flush(part)
        with contextlib.suppress(OSError):  # not empty: the other process was faster
            part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def recover(directory: Path) -> None:
    """Clears away what a process that was killed has left in a directory of published ones."""
    for path in directory.glob("*.tmp"):
        shutil.rmtree(path)
    for old in directory.glob("*.old"):
        if old.with_suffix("").exists():
            shutil.rmtree(old)
        else:  # killed between the two renames of `publish`
            old.rename(old.with_suffix(""))


def discard(directory: Path) -> None:
    """Removes a directory that bears the name of something complete; killed in between it leaves nothing of that name."""
    doomed = directory.with_name(directory.name + ".discarded.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    directory.rename(doomed)
    shutil.rmtree(doomed)


def flush_entry(directory: Path) -> None:
    """Forces the entries of one directory to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    packages = "bothways torch deepspeed accelerate transformers tokenizers onnx onnxruntime tensorrt tensorrt-rtx-cu13"
    for name in [*packages.split(), "nvidia-modelopt", "numpy"]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_stage(directory: Path) -> dict[str, Any] | None:
    """Returns the stage.json of a finished stage, or None when the stage has not finished."""
    path = directory / STAGE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = {"stage", "kind", "fingerprint", "files"} - set(record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({error}): remove {directory} to run the stage again") from None
    if missing:
        raise UserError(f"{path}: not written by a stage (no '{min(missing)}'): remove {directory} to run the stage again")
    return record


def lineage(directory: Path) -> dict[Path, dict[str, Any]]:
    """Returns {directory: stage.json} of a finished stage and of the stages beside it that led to it, nearest first."""
    found: dict[Path, dict[str, Any]] = {}
    waiting = [directory]
    while waiting:
        current = waiting.pop(0)
        record = None if current in found else read_stage(current)
        if record is not None:
            found[current] = record
            # A stage is named by its bare name; anything with a slash is a path, a hub id or a file of a package. Of models that
            # were chosen from, only the chosen one led to it.
            chosen = record.get("chosen")
            names = [chosen] if chosen else [entry["reference"] for entry in record["inputs"].values()]
            waiting += [current.parent / name for name in names if "/" not in name]
    return found


class Stage(Generic[Section]):
    """One stage of one recipe as its entry point sees it: a validated section, its inputs and its directories."""

    def __init__(self, recipe: Recipe, name: str, config: type[Section]) -> None:
        if name not in recipe.stages:
            raise UserError(f"{recipe.path}: no stage '{name}'{did_you_mean(name, list(recipe.stages))}")
        self.recipe = recipe
        self.name = name
        self.kind = recipe.stages[name][0]
        self.config: Section = recipe.section(name, config)
        own: int | None = getattr(self.config, "seed", None)
        self.seed = recipe.seed if own is None else own
        self.directory = recipe.directory(name)
        self.partial = self.directory.with_name(name + ".partial")
        self.output = self.partial / "output"
        self.restart = False
        self.known: dict[str, dict[str, Any]] = {}
        """Entries of files of `output` that were hashed already, as `hash_directory` gives them."""
        self._begun = False

    def upstream(self) -> list[str]:
        """Returns the names of the stages that this one reads, in the order of its keys."""
        names = [str(ref) for _, ref in references(self.config) if isinstance(ref, ModelRef)]
        return list(dict.fromkeys(name for name in names if name in self.recipe.stages))

    @functools.cached_property
    def inputs(self) -> dict[str, dict[str, str]]:
        """{dotted key: {"reference", "sha256"}} of everything this stage reads; hub ids carry no hash.

        Raises:
            UserError: an input is missing, or the stage that makes it has not finished.
        """
        found: dict[str, dict[str, str]] = {}
        for key, reference in references(self.config):
            path = self.recipe.find(reference, f"stages.{self.name}.{self.kind}.{key}")
            entry = found[key] = {"reference": str(reference)}
            if isinstance(reference, ModelRef) and reference in self.recipe.stages:
                finished = read_stage(self.recipe.directory(reference))
                if finished is None:
                    raise UserError(f"{self.recipe.path}: stage '{self.name}' needs stage '{reference}', which has not finished")
                entry["sha256"] = digest(finished["files"])
            elif isinstance(path, list):
                entry["sha256"] = digest([[file.name, input_sha256(file)] for file in path])
            elif isinstance(path, Path):
                directory = path.is_dir()
                entry["sha256"] = digest(hash_directory(path, sha256=input_sha256)) if directory else input_sha256(path)
        return found

    def shared(self, *keys: str) -> Path:
        """Returns the directory of what follows from these keys of the section alone, whichever stage has made it.

        It may be absent, and so may every entry of it; what is in it is complete (`made_once`).
        """
        section = self.config.model_dump(mode="json", include=set(keys))
        inputs = {key: entry for key, entry in self.inputs.items() if key.partition(".")[0] in keys}
        return self.recipe.directory(SHARED) / digest({"section": section, "inputs": inputs})[:32]

    @property
    def fingerprint(self) -> str:
        """Identity of the work: same kind, section, seed and input bytes → same fingerprint."""
        return digest(self._work())

    def _work(self) -> dict[str, Any]:
        section = self.config.model_dump(mode="json")
        return {"kind": self.kind, "section": section, "seed": self.seed, "inputs": self.inputs}

    def finished(self) -> bool:
        """True when the directory holds the result of exactly this section and these inputs, with every file in place."""
        done = read_stage(self.directory)
        if done is None or done["fingerprint"] != self.fingerprint:
            return False
        files = {self.directory / name: entry["bytes"] for name, entry in done["files"].items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in files.items())

    def begin(self) -> None:
        """Makes the working directory, or keeps the one of an interrupted run of the same work.

        How the work is spread over processes may change: that makes it no other work.

        Raises:
            UserError: an interrupted run of other work lies there and `restart` is not set.
        """
        marker = self.partial / WORK_FILE
        work = self._work()
        if self.partial.exists():
            try:
                before = json.loads(marker.read_text())
            except (OSError, json.JSONDecodeError):
                before = None
            if self.restart or before is None:
                shutil.rmtree(self.partial)
            else:
                placement = getattr(self.config, "PLACEMENT", ())
                changed = [key for key in _differences(before, work) if not key.startswith(placement)]
                if changed:
                    raise UserError(
                        f"{self.partial}: an interrupted run of stage '{self.name}' with other settings (changed: "
                        f"{', '.join(key.removeprefix('section.') for key in changed)}): "
                        "undo the change to go on, or add --restart to throw that run away"
                    )
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        if not marker.exists():
            part = marker.with_suffix(".tmp")
            part.write_text(json.dumps(work))
            part.rename(marker)
        self._begun = True

    def complete(self, **facts: Any) -> None:
        """Writes stage.json beside the files in `output/` and publishes the directory.

        Args:
            facts: what the stage measured: `metrics`, `parameters`, `weight_bytes`, `seconds`, …
        """
        record = {
            "stage": self.name,
            "kind": self.kind,
            "recipe": self.recipe.name,
            "section": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "inputs": self.inputs,
            "fingerprint": self.fingerprint,
            "versions": versions(),
            "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform(), "instructions": instructions()},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **facts,
            "files": hash_directory(self.output, known=self.known),
        }
        (self.output / STAGE_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        publish(self.output, self.directory)
        shutil.rmtree(self.partial, ignore_errors=True)

    def abandon(self) -> None:
        """Removes the working directory of a run that failed, unless it holds a checkpoint or a corpus to go on from."""
        if not self._begun:
            return
        shutil.rmtree(self.output, ignore_errors=True)
        if any(path.suffix != ".tmp" for pattern in ("checkpoints/*", "corpus/*") for path in self.partial.glob(pattern)):
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # only when nothing else is in them
            for directory in (*self.recipe.directory(SHARED).glob("*"), self.recipe.directory(SHARED)):
                directory.rmdir()
        with contextlib.suppress(OSError):
            self.partial.parent.rmdir()
            self.partial.parent.parent.rmdir()


def _differences(before: Any, after: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{where}.{key}".lstrip("."))]
    return [] if before == after else [where]


def stage_main(module: str, config: type[Section], run: Callable[[Stage[Section]], None], argv: list[str] | None = None) -> None:
    """Command line of one stage: `python -m MODULE RECIPE --stage NAME`; exits 2 with one line on a user's mistake.

    Args:
        module: the module's name, for `--help`.
        config: class of the stage's section.
        run: does the work; it calls `stage.begin()` and `stage.complete()` on the main process.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=sys.modules[run.__module__].__doc__,
        epilog=f"example: accelerate launch -m {module} recipe.yaml --stage NAME --set train.epochs=1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the recipe file")
    parser.add_argument("--stage", required=True, help="which of its stages to run")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a key of the recipe")
    parser.add_argument("--runs", default="runs", help="where run directories lie (default: runs)")
    parser.add_argument("--restart", action="store_true", help="throw an interrupted run of this stage away")
    arguments = parser.parse_args(argv)

    def work() -> None:
        stage = Stage(load_recipe(arguments.recipe, arguments.set, arguments.runs), arguments.stage, config)
        stage.restart = arguments.restart
        try:
            run(stage)
        except Exception:
            stage.abandon()
            raise

    run_rank(work, arguments.runs)
