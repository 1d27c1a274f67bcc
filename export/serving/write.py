"""Writes a bundle: the Triton repository, the engines, golden rows, and the manifest last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.answers import Answers, Row, Run
from engine.answers._texts import limit
from engine.cpu import instructions
from engine.errors import UserError
from engine.stages.stage import hash_directory, versions
from export.engines import Weights
from export.engines.ort import OrtEngine
from export.engines.parity import run_of
from export.serving.bundle import TOKENIZER, load_answers, load_tokenizer, mended, verify_bundle
from export.serving.golden import GOLDEN, Golden, observe
from export.serving.manifest import FORMAT, MANIFEST, UNLISTED, Manifest
from export.serving.triton import write_repository


def write_bundle(
    directory: Path,
    *,
    name: str,
    task: str,
    facts: dict[str, Any],
    max_length: int,
    max_batch: int,
    tokenizer: Path,
    engines: dict[str, dict[str, Path]],
    golden: list[Row],
    reference: Run,
    weights: Weights | None = None,
    parity: dict[str, Any],
    benchmark: dict[str, Any],
    provenance: dict[str, Any],
    tolerance: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a bundle, opens it again and verifies it.

    Args:
        directory: exists; files that already lie in it become part of the bundle, later ones are refused when it is opened.
        task: name of the answering half.
        facts: what it has to know.
        tokenizer: directory with the tokenizer.json and tokenizer_config.json of the model.
        engines: {graph: {"onnxruntime": .onnx file, "tensorrt": plan, "tensorrt_rtx": engine}}; the first is required.
        golden: rows, by the names of the task's inputs.
        reference: `run` of the fp32 model.
        weights: form of the engines' int8 weights; None: they compute with floats.
        tolerance: bounds that replace those of `default_tolerance`.

    Returns:
        what verifying it measured, see `Bundle.verify`.

    Raises:
        UserError: a tokenizer without a padding token, labels or names that a Triton repository cannot hold, outputs that are
            not finite or not those that the task reads.
    """
    from export.engines.graph import weight_bytes

    _write_tokenizer(directory / TOKENIZER, tokenizer, max_length)
    answers = load_answers(directory, task, facts, Tokenizer.from_file(str(directory / TOKENIZER)))
    loaded = {graph: OrtEngine(files["onnxruntime"], wide=weights == "8bit") for graph, files in engines.items()}
    signatures = {graph: engine.signature() for graph, engine in loaded.items()}
    files = _write_engines(directory, name, task, answers, signatures, max_batch, engines, weights)
    observed = _observe(answers, run_of(loaded), reference, golden, next(iter(engines.values()))["onnxruntime"])
    lines = [json.dumps(row.as_json(), ensure_ascii=False) for row in observed]
    (directory / GOLDEN).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "name": name,
        "task": {"type": task, "facts": facts},
        "max_length": max_length,
        "max_batch": max_batch,
        "graphs": {
            graph: {
                **signatures[graph],
                "engines": {runtime: {"file": file, "weights": weights} for runtime, file in files[graph].items()},
            }
            for graph in engines
        },
        "weight_bytes": sum(weight_bytes(entry["onnxruntime"]) for entry in engines.values()),
        "parity": parity,
        "benchmark": benchmark,
        "versions": versions(),
        "instructions": instructions(),
        "provenance": provenance,
        "tolerance": default_tolerance(answers, observed) | (tolerance or {}),
        "files": hash_directory(directory, skip=tuple(UNLISTED)),
    }
    text = Manifest.model_validate(manifest).model_dump_json(indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return verify_bundle(directory)


def _observe(answers: Answers, run: Run, reference: Run, rows: Sequence[Row], file: Path) -> list[Golden]:
    try:
        with mended():
            observed = observe(answers, run, reference, rows)
        finite = all(np.isfinite(values).all() for row in observed for values in row.outputs.values())
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file}: does not give what the task reads ({error!r}): look at its export") from None
    if not finite:
        raise UserError(f"{file}: does not give finite numbers: look at its export")
    return observed


def _write_engines(
    directory: Path,
    name: str,
    task: str,
    answers: Answers,
    signatures: dict[str, Any],
    max_batch: int,
    engines: dict[str, dict[str, Path]],
    weights: Weights | None,
) -> dict[str, dict[str, str]]:
    """Writes the Triton repository and the engines that are not for Triton; returns {graph: {runtime: file of its engine}}."""
    repository = write_repository(
        directory / "models",
        name=name,
        task=task,
        answers=answers,
        graphs=signatures,
        max_batch=max_batch,
        tokenizer=directory / TOKENIZER,
        engines=engines,
        weights=weights,
    )
    found = {graph: {runtime: f"models/{path}" for runtime, path in files.items()} for graph, files in repository.items()}
    for graph, files in engines.items():
        if "tensorrt_rtx" in files:
            target = found[graph]["tensorrt_rtx"] = f"engines/tensorrt_rtx/{graph}.engine"
            (directory / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files["tensorrt_rtx"], directory / target)
    return found


def _write_tokenizer(target: Path, source: Path, max_length: int) -> None:
    """Copies a tokenizer with truncation and padding set in tokenizer.json: whoever loads that file tokenizes alike."""
    try:
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(source / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: a bundle needs the tokenizer of the model") from None
    token = config.get("pad_token")
    token = token["content"] if isinstance(token, dict) else token
    try:
        limit(tokenizer, max_length, token, config.get("truncation_side", "right"))
    except KeyError:
        raise UserError(f"{source / 'tokenizer_config.json'}: no pad_token that the vocabulary knows: name one") from None
    target.parent.mkdir()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target.with_name(name))
    tokenizer.save(str(target))


def default_tolerance(answers: Answers, golden: list[Golden]) -> dict[str, Any]:
    """Returns the bounds that a bundle is verified with, from what was measured at export.

    One machine gives the same bits for every batch and padding. Other kernels (another CPU, another release) move fp32 outputs by
    some 1e-6 of their spread; an int8 engine re-rounds activations, which moved single logits by up to a third of what
    quantization itself had moved them (MiniLM-L6, ONNX Runtime's int8 against its unfused graph). So a bundle may drift by as
    much as quantization did, and never has to be closer than 0.1 % of the spread.
    """
    bounds = {}
    for name in golden[0].outputs:
        own, reference = (
            np.concatenate([row.outputs[name] for row in golden]),
            np.concatenate([row.reference[name] for row in golden]),
        )
        moved = float(np.abs(own - reference).max())
        drift = max(moved, 1e-3 * float(np.std(reference)))
        bounds[name] = {"golden": drift, "invariance": drift, "reference": moved + drift}
    agreement = answers.agreement([row.answer for row in golden], [row.reference_answer for row in golden])
    return {"outputs": bounds, "agreement": max(0.0, agreement - 0.05)}
