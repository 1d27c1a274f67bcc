"""The deployable bundle: engines, tokenizer, labels, a Triton repository, golden inputs, and the hash of every file.

Predicting needs only ONNX Runtime (or TensorRT), `tokenizers` and NumPy.

Shapes: B rows, L tokens, N rows of a whole call, C classes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.cpu import instructions
from engine.errors import UserError, did_you_mean
from engine.stage import hash_directory, versions
from engine.tasks import ClassificationConfig
from export.engines import Engine, Weights
from export.engines.ort import OrtEngine
from export.serving.manifest import FORMAT, MANIFEST, UNLISTED, Manifest, check_files, read_file, read_manifest
from export.serving.triton import write_repository

Row = dict[str, Any]

TOKENIZER = "tokenizer/tokenizer.json"
GOLDEN = "golden.jsonl"
ENCODED_AT_ONCE = 4096
"""Rows that are tokenized and sorted by length together: bounds the memory of a long file."""


class Bundle:
    """An opened bundle: tokenizer and one engine, ready to predict.

    A row is {"text": …} and, for pairs, {"text_pair": …}; the task's own column names are understood too.
    """

    def __init__(self, directory: Path, manifest: Manifest, identity: str, tokenizer: Tokenizer, engine: Engine) -> None:
        self.directory, self.manifest, self.tokenizer, self.engine = directory, manifest, tokenizer, engine
        self.identity = identity
        """SHA-256 of manifest.json: names the bundle with everything in it."""
        self.labels = manifest.labels

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, engine: str | None = None, threads: int | None = None) -> Bundle:
        """Opens a bundle.

        Args:
            path: its directory.
            verify: compare every file with the manifest; without, only the files that are loaded are compared.
            engine: `onnxruntime` (the default), `tensorrt` or `tensorrt_rtx`, which need a GPU.
            threads: of ONNX Runtime; None: one per core.

        Raises:
            UserError: not a bundle, a file that is changed, missing or not listed, an engine that it does not hold.
        """
        directory = Path(path)
        try:
            manifest, identity = read_manifest(directory)
            if verify:
                check_files(directory, manifest)
            tokenizer = _load_tokenizer(directory / TOKENIZER, read_file(directory, manifest, TOKENIZER))
            loaded = _load_engine(directory, manifest, engine or "onnxruntime", threads)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return cls(directory, manifest, identity, tokenizer, loaded)

    def encode(self, rows: list[Row]) -> dict[str, np.ndarray]:
        """Tokenizes rows; returns int64 arrays of shape (B, L), cut to the bundle's length and padded to the longest row.

        Raises:
            UserError: a row without its text.
        """
        encoded = self.tokenizer.encode_batch([self._texts(row) for row in rows])
        return {
            "input_ids": np.array([row.ids for row in encoded], dtype=np.int64),
            "attention_mask": np.array([row.attention_mask for row in encoded], dtype=np.int64),
            "token_type_ids": np.array([row.type_ids for row in encoded], dtype=np.int64),
        }

    def logits(self, rows: list[Row], batch_size: int | None = None) -> np.ndarray:
        """Returns the engine's float32 logits in the order of `rows`, shape (N, C).

        Args:
            batch_size: rows of one call of the engine; None: as many as the bundle's engines take.
        """
        size = min(batch_size or self.manifest.max_batch, self.manifest.max_batch)
        logits_NC = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            arrays = self.encode(rows[start : start + ENCODED_AT_ONCE])
            lengths = arrays["attention_mask"].sum(axis=1)
            order = np.argsort(lengths, kind="stable")
            for batch in (order[first : first + size] for first in range(0, len(order), size)):
                longest = lengths[batch].max()
                logits_NC[start + batch] = self.engine.run({name: array[batch, :longest] for name, array in arrays.items()})
        return logits_NC

    def predict(self, rows: list[Row], batch_size: int | None = None) -> list[dict[str, Any]]:
        """Returns {"label", "score", "scores": {label: probability}} of each row."""
        return [self.prediction(scores) for scores in softmax(self.logits(rows, batch_size))]

    def prediction(self, scores_C: np.ndarray) -> dict[str, Any]:
        """Puts names to the probabilities of one row."""
        best = int(scores_C.argmax())
        scores = dict(zip(self.labels, digits(scores_C), strict=True))
        return {"label": self.labels[best], "score": scores[self.labels[best]], "scores": scores}

    def golden(self) -> list[dict[str, Any]]:
        """Returns the golden rows: text, logits of the engine at export, reference logits of the fp32 model."""
        text = read_file(self.directory, self.manifest, GOLDEN).decode()
        try:
            rows = [json.loads(line) for line in text.split("\n") if line]
            shapes = {np.shape(row[key]) for row in rows for key in ("logits", "reference")}
        except (ValueError, KeyError, TypeError):
            shapes = set()
        if shapes != {(len(self.labels),)}:
            raise UserError(f"{self.directory / GOLDEN}: no golden inputs with {len(self.labels)} logits each: {_AGAIN}")
        return rows

    def verify(self) -> dict[str, Any]:
        """Runs the golden inputs again: alone, in batches and padded.

        Returns:
            {"name", "identity", "files", "bytes", "inputs": golden inputs, "instructions": {"export", "here": of the CPUs},
            "measured": {"golden", "batch", "padding", "reference": largest differences of a logit, "label_agreement"},
            "tolerance": the manifest's bounds}.

        Raises:
            UserError: a bound is broken.
        """
        rows, bound = self.golden(), self.manifest.tolerance
        alone_NC = self._one_by_one(rows)
        found = {
            "golden": _distance(alone_NC, np.array([row["logits"] for row in rows], dtype=np.float32)),
            "batch": _distance(alone_NC, self._padded(rows, 0)),
            "padding": _distance(alone_NC, self._padded(rows, self.manifest.max_length)),
            **_parity(alone_NC, rows),
        }
        limits = {"golden": bound.golden, "batch": bound.invariance, "padding": bound.invariance, "reference": bound.reference}
        for check, limit in limits.items():
            if not found[check] <= limit:
                raise UserError(
                    f"{self.directory}: {_MEANING[check]} by {found[check]:.4g}, more than {limit:.4g}: {self._mend()}"
                )
        if not found["label_agreement"] >= bound.label_agreement:
            raise UserError(
                f"{self.directory}: only {found['label_agreement']:.1%} of the golden inputs get the fp32 model's label, "
                f"less than {bound.label_agreement:.1%}: {self._mend()}"
            )
        return {
            "name": self.manifest.name,
            "identity": self.identity,
            "files": len(self.manifest.files),
            "bytes": sum(entry.bytes for entry in self.manifest.files.values()),
            "inputs": len(rows),
            "instructions": {"export": self.manifest.instructions, "here": instructions()},
            "measured": found,
            "tolerance": bound.model_dump(),
        }

    def _mend(self) -> str:
        there, here = (", ".join(found) or "unknown instructions" for found in (self.manifest.instructions, instructions()))
        other = f" (exported on a CPU with {there}; this one has {here})" if there != here else ""
        return f"this machine computes something else{other}: install the versions in manifest.json or export the bundle here"

    def _one_by_one(self, rows: list[Row]) -> np.ndarray:
        return np.concatenate([self.engine.run(self.encode([row])) for row in rows])

    def _padded(self, rows: list[Row], length: int) -> np.ndarray:
        """Runs full batches in the order given, padded to the longest row or to `length` tokens."""
        assert self.tokenizer.padding is not None
        fill, parts = {"input_ids": self.tokenizer.padding["pad_id"]}, []
        for start in range(0, len(rows), self.manifest.max_batch):
            arrays = self.encode(rows[start : start + self.manifest.max_batch])
            width = max(0, length - arrays["input_ids"].shape[1])
            arrays = {
                name: np.pad(array, ((0, 0), (0, width)), constant_values=fill.get(name, 0)) for name, array in arrays.items()
            }
            parts.append(self.engine.run(arrays))
        return np.concatenate(parts)

    def _texts(self, row: Row) -> str | tuple[str, str]:
        task = self.manifest.task
        found = []
        for column, key in ((task.text, "text"), (task.text_pair, "text_pair")):
            if column is None:
                continue
            text = row.get(column, row.get(key))
            if text is None:
                raise UserError(f"a row has no '{column}'{did_you_mean(column, list(row))}")
            text = str(text)
            if not text.isascii() and text != text.encode(errors="replace").decode():
                raise UserError(f"'{column}' of a row is not valid Unicode (a lone surrogate): {text[:40]!a}")
            found.append(text)
        return found[0] if len(found) == 1 else (found[0], found[1])


_MEANING = {
    "golden": "the engine differs from its golden logits",
    "batch": "a row's logits change with its neighbours in the batch",
    "padding": "a row's logits change with padding",
    "reference": "the engine differs from the fp32 model that it came from",
}
_AGAIN = "export the bundle anew"


def softmax(logits_BC: np.ndarray) -> np.ndarray:
    """Returns float32 probabilities, shape (B, C)."""
    exponentials = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def write_bundle(
    directory: Path,
    *,
    name: str,
    task: ClassificationConfig,
    labels: list[str],
    max_length: int,
    max_batch: int,
    tokenizer: Path,
    engines: dict[str, Path],
    weights: Weights | None = None,
    golden: list[Row],
    parity: dict[str, Any],
    benchmark: dict[str, Any],
    provenance: dict[str, Any],
    tolerance: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Writes a bundle, the manifest last, opens it again and verifies it.

    Args:
        directory: exists; files that already lie in it become part of the bundle, later ones are refused when it is opened.
        labels: class names in the order of the logits.
        tokenizer: directory with the tokenizer.json and tokenizer_config.json of the model.
        engines: {"onnxruntime": .onnx file, "tensorrt": plan, "tensorrt_rtx": engine}; the first is required.
        weights: form of the engines' int8 weights; None: they compute with floats.
        golden: rows {"text" (and "text_pair"), "reference": logits of the fp32 model}.
        tolerance: bounds that replace those of `default_tolerance`.

    Returns:
        what verifying it measured, see `Bundle.verify`.

    Raises:
        UserError: a tokenizer without a padding token, labels or input names that a Triton repository cannot hold, logits that
            are not finite.
    """
    from export.engines.graph import weight_bytes

    _write_tokenizer(directory / TOKENIZER, tokenizer, max_length)
    engine = OrtEngine(engines["onnxruntime"], wide=weights == "8bit")
    files = _write_engines(directory, name, labels, engine.inputs, task.text_pair is not None, max_batch, engines)
    manifest = {
        "format": FORMAT,
        "name": name,
        "task": {"type": task.type, "text": task.text, "text_pair": task.text_pair},
        "labels": labels,
        "max_length": max_length,
        "max_batch": max_batch,
        "inputs": engine.inputs,
        "weight_bytes": weight_bytes(engines["onnxruntime"]),
        "engines": {runtime: {"file": file, "weights": weights} for runtime, file in files.items()},
        "parity": parity,
        "benchmark": benchmark,
        "versions": versions(),
        "instructions": instructions(),
        "provenance": provenance,
    }
    draft = Manifest.model_validate({**manifest, "tolerance": _NO_BOUND, "files": hash_directory(directory)})
    bundle = Bundle(directory, draft, "", Tokenizer.from_file(str(directory / TOKENIZER)), engine)
    logits_NC = bundle._one_by_one(golden)
    if logits_NC.shape[1] != len(labels) or not np.isfinite(logits_NC).all():
        raise UserError(f"{engines['onnxruntime']}: does not give {len(labels)} finite logits a row: look at its export")
    _write_golden(directory / GOLDEN, golden, logits_NC)
    manifest["tolerance"] = default_tolerance(logits_NC, golden) | (tolerance or {})
    manifest["files"] = hash_directory(directory, skip=tuple(UNLISTED))
    text = Manifest.model_validate(manifest).model_dump_json(indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return verify_bundle(directory)


def _write_engines(
    directory: Path, name: str, labels: list[str], inputs: list[str], text_pair: bool, max_batch: int, engines: dict[str, Path]
) -> dict[str, str]:
    """Writes the Triton repository and the engines that are not for Triton; returns {runtime: file of its engine}."""
    repository = write_repository(
        directory / "models",
        name=name,
        labels=labels,
        inputs=inputs,
        text_pair=text_pair,
        max_batch=max_batch,
        tokenizer=directory / TOKENIZER,
        onnx=engines["onnxruntime"],
        plan=engines.get("tensorrt"),
    )
    files = {runtime: f"models/{path}" for runtime, path in repository.items()}
    if "tensorrt_rtx" in engines:
        files["tensorrt_rtx"] = "engines/tensorrt_rtx/model.engine"
        (directory / files["tensorrt_rtx"]).parent.mkdir(parents=True)
        shutil.copyfile(engines["tensorrt_rtx"], directory / files["tensorrt_rtx"])
    return files


_NO_BOUND = {"golden": 0.0, "invariance": 0.0, "reference": 0.0, "label_agreement": 0.0}


def _write_tokenizer(target: Path, source: Path, max_length: int) -> None:
    """Copies a tokenizer with truncation and padding set in tokenizer.json: whoever loads that file tokenizes alike."""
    try:
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = _load_tokenizer(source / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: a bundle needs the tokenizer of the model") from None
    token = config.get("pad_token")
    token = token["content"] if isinstance(token, dict) else token
    pad_id = tokenizer.token_to_id(token) if token else None
    if pad_id is None:
        raise UserError(f"{source / 'tokenizer_config.json'}: no pad_token that the vocabulary knows: name one")
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=token)
    target.parent.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target.with_name(name))
    tokenizer.save(str(target))


def _write_golden(path: Path, rows: list[Row], logits_NC: np.ndarray) -> None:
    """Writes golden.jsonl."""
    with path.open("w", encoding="utf-8") as file:
        for row, logits_C in zip(rows, logits_NC, strict=True):
            record: Row = {key: row[key] for key in ("text", "text_pair") if key in row}
            record |= {"logits": digits(logits_C), "reference": digits(row["reference"])}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def digits(values: Any) -> list[float]:
    """Returns float32 numbers as Python numbers of the fewest digits that read back as the same bits."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


def verify_bundle(path: str | Path, engine: str | None = None, threads: int | None = None) -> dict[str, Any]:
    """Checks hashes, golden outputs, batch and padding invariance and parity; see `Bundle.verify`.

    Raises:
        UserError: a check fails.
    """
    return Bundle.open(path, engine=engine, threads=threads).verify()


def _load_tokenizer(path: Path, data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UserError(f"{path}: not a tokenizer that this version of `tokenizers` reads: {error}") from None


def _load_engine(directory: Path, manifest: Manifest, name: str, threads: int | None) -> Engine:
    if name not in manifest.engines:
        raise UserError(f"{directory}: the bundle has no engine '{name}'{did_you_mean(name, list(manifest.engines))}")
    file = manifest.engines[name].file
    if name == "onnxruntime":
        return OrtEngine(read_file(directory, manifest, file), threads, wide=manifest.engines[name].weights == "8bit")
    from export.engines.trt import TrtEngine

    return TrtEngine(directory / file, name)


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).max())


def _parity(logits_NC: np.ndarray, rows: list[Row]) -> dict[str, float]:
    """Compares with the fp32 model: {"reference": largest difference, "label_agreement": share of equal labels}."""
    reference_NC = np.array([row["reference"] for row in rows], dtype=np.float32)
    agreement = (logits_NC.argmax(axis=1) == reference_NC.argmax(axis=1)).mean()
    return {"reference": _distance(logits_NC, reference_NC), "label_agreement": float(agreement)}


def default_tolerance(logits_NC: np.ndarray, rows: list[Row]) -> dict[str, float]:
    """Returns the bounds that a bundle is verified with, from what was measured at export.

    One machine gives the same bits for every batch and padding. Other kernels (another CPU, another release) move fp32 logits by
    some 1e-6 of their spread; an int8 engine re-rounds activations, which moved single logits by up to a third of what
    quantization itself had moved them (MiniLM-L6, ONNX Runtime's int8 against its unfused graph). So a bundle may drift by as
    much as quantization did, and never has to be closer than 0.1 % of the spread.
    """
    parity = _parity(logits_NC, rows)
    spread = float(np.std([row["reference"] for row in rows]))
    drift = max(parity["reference"], 1e-3 * spread)
    return {
        "golden": drift,
        "invariance": drift,
        "reference": parity["reference"] + drift,
        "label_agreement": max(0.0, parity["label_agreement"] - 0.05),
    }
