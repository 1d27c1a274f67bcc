"""The deployable bundle: engines, tokenizer, a Triton repository with the answering half, golden inputs, the hash of every file.

Predicting needs only ONNX Runtime (or TensorRT), `tokenizers` and NumPy. The answering half that predicts is the installed one:
no code of a bundle is run here, and golden answers show whether it is the one that the bundle was exported with.

Shapes: N rows of a whole call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.answers import Answer, Answers, Arrays, Row, RowError, Run, answering
from engine.answers._batches import answer_all
from engine.cpu import instructions
from engine.errors import UserError, did_you_mean
from export.engines import Engine
from export.engines.ort import OrtEngine
from export.engines.parity import run_of
from export.serving.golden import GOLDEN, Golden, measure, parse
from export.serving.manifest import Manifest, check_files, read_file, read_manifest

TOKENIZER = "tokenizer/tokenizer.json"


class Bundle:
    """An opened bundle: the answering half of its task and an engine for each graph, ready to predict.

    A row holds the inputs of the task, by their names (`text`, …) or by the columns of the rows that it was trained on.
    """

    def __init__(self, directory: Path, manifest: Manifest, identity: str, answers: Answers, engines: dict[str, Engine]) -> None:
        self.directory, self.manifest, self.answers, self.engines = directory, manifest, answers, engines
        self.identity = identity
        """SHA-256 of manifest.json: names the bundle with everything in it."""

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, engine: str | None = None, threads: int | None = None) -> Bundle:
        """Opens a bundle.

        Args:
            path: its directory.
            verify: compare every file with the manifest; without, only the files that are loaded are compared.
            engine: `onnxruntime` (the default), `tensorrt` or `tensorrt_rtx`, which need a GPU.
            threads: of ONNX Runtime; None: one per core.

        Raises:
            UserError: not a bundle, a file that is changed, missing or not listed, an engine that it does not hold, a task
                that is not installed.
        """
        directory = Path(path)
        try:
            manifest, identity = read_manifest(directory)
            if verify:
                check_files(directory, manifest)
            tokenizer = load_tokenizer(directory / TOKENIZER, read_file(directory, manifest, TOKENIZER))
            answers = load_answers(directory, manifest.task.type, manifest.task.facts, tokenizer)
            loaded = _load_engines(directory, manifest, engine or "onnxruntime", threads)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return cls(directory, manifest, identity, answers, loaded)

    @property
    def run(self) -> Run:
        """`run(graph, arrays)` of the engines, one batch a call."""
        return run_of(self.engines)

    def encode(self, rows: Sequence[Row]) -> Arrays:
        """Returns the inputs of the first graph, cut to the bundle's length and padded to the longest row.

        Raises:
            UserError: a row without its input.
        """
        with mended():
            return self.answers.prepare(rows)

    def predict(self, rows: Sequence[Row], batch_size: int | None = None) -> list[Answer]:
        """Returns the answers in the order of `rows`, as the task has them; classification: {"label", "score", "scores"}.

        Args:
            batch_size: rows of one call of an engine; None: as many as the bundle's engines take.

        Raises:
            UserError: a row without its input.
        """
        size = min(batch_size or self.manifest.max_batch, self.manifest.max_batch)
        with mended():
            return answer_all(self.answers, self.run, rows, size)

    def golden(self) -> list[Golden]:
        """Returns the golden rows with what the engines gave at export and what the fp32 model gave."""
        return parse(self.directory / GOLDEN, read_file(self.directory, self.manifest, GOLDEN))

    def verify(self) -> dict[str, Any]:
        """Runs the golden inputs again: alone, in batches and padded.

        Returns:
            {"name", "identity", "files", "bytes", "inputs": golden inputs, "instructions": {"export", "here": of the CPUs},
            "measured": see `export.serving.golden.measure`, "tolerance": the manifest's bounds}.

        Raises:
            UserError: a bound is broken.
        """
        golden, bound = self.golden(), self.manifest.tolerance
        found = measure(self.answers, self.run, golden, self.manifest.max_batch, self.manifest.max_length)
        if found["outputs"].keys() != bound.outputs.keys():
            raise UserError(f"{self.directory / GOLDEN}: holds other outputs than {', '.join(bound.outputs)}: {_AGAIN}")
        for name, limits in bound.outputs.items():
            moved = found["outputs"][name]
            for check, limit in _limits(limits).items():
                if not moved[check] <= limit:
                    raise UserError(
                        f"{self.directory}: {name} {_MEANING[check]} by {moved[check]:.4g}, more than {limit:.4g}: {self._mend()}"
                    )
        for check, whose in (("agreement", "of the fp32 model"), ("golden_agreement", "that they had at export")):
            if not found[check] >= bound.agreement:
                raise UserError(
                    f"{self.directory}: only {found[check]:.1%} of the golden inputs get the answer {whose}, "
                    f"less than {bound.agreement:.1%}: {self._mend()}"
                )
        return {
            "name": self.manifest.name,
            "identity": self.identity,
            "files": len(self.manifest.files),
            "bytes": sum(entry.bytes for entry in self.manifest.files.values()),
            "inputs": len(golden),
            "instructions": {"export": self.manifest.instructions, "here": instructions()},
            "measured": found,
            "tolerance": bound.model_dump(),
        }

    def _mend(self) -> str:
        there, here = (", ".join(found) or "unknown instructions" for found in (self.manifest.instructions, instructions()))
        other = f" (exported on a CPU with {there}; this one has {here})" if there != here else ""
        return f"this machine computes something else{other}: install the versions in manifest.json or export the bundle here"


_MEANING = {
    "golden": "differs from its golden values",
    "batch": "of a row changes with its neighbours in the batch",
    "padding": "of a row changes with padding",
    "reference": "differs from that of the fp32 model that the engine came from",
}
_AGAIN = "export the bundle anew"


def _limits(bound: Any) -> dict[str, float]:
    return {"golden": bound.golden, "batch": bound.invariance, "padding": bound.invariance, "reference": bound.reference}


@contextmanager
def mended() -> Iterator[None]:
    """Turns what the answering half says about a row into a message for users."""
    try:
        yield
    except RowError as error:
        raise UserError(str(error)) from None


def verify_bundle(path: str | Path, engine: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Checks hashes, golden outputs and answers, batch and padding invariance and parity; see `Bundle.verify`.

    Raises:
        UserError: a check fails.
    """
    return Bundle.open(path, engine=engine, threads=threads).verify()


def load_tokenizer(path: Path, data: bytes) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        UserError: it is none.
    """
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UserError(f"{path}: not a tokenizer that this version of `tokenizers` reads: {error}") from None


def load_answers(directory: Path, task: str, facts: dict[str, Any], tokenizer: Tokenizer) -> Answers:
    """Returns the installed answering half of a bundle's task.

    Raises:
        UserError: it is not installed, or knows other facts.
    """
    try:
        chosen = answering(task)
    except KeyError:
        raise UserError(f"{directory}: no task '{task}' is installed here: install the package that brings it") from None
    try:
        answers = chosen(facts, tokenizer)
        _ = answers.columns, answers.served
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: the facts of task '{task}' in its manifest are damaged ({error!r}): {_AGAIN}") from None
    return answers


def _load_engines(directory: Path, manifest: Manifest, runtime: str, threads: int | None) -> dict[str, Engine]:
    if runtime not in manifest.runtimes:
        raise UserError(f"{directory}: the bundle has no engine '{runtime}'{did_you_mean(runtime, list(manifest.runtimes))}")
    entries = {graph: entry.engines[runtime] for graph, entry in manifest.graphs.items()}
    if runtime == "onnxruntime":
        return {
            graph: OrtEngine(read_file(directory, manifest, entry.file), threads, wide=entry.weights == "8bit")
            for graph, entry in entries.items()
        }
    from export.engines.trt import TrtEngine

    return {graph: TrtEngine(directory / entry.file, runtime) for graph, entry in entries.items()}
