"""`bothways evaluate`: any saved model or bundle on new data, by the answering half that serves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.answers import Answer, Answers, Row
from engine.config import Recipe
from engine.data.sources import PlacedRow, SourceConfig, SourceRows
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval, bootstrap_metrics
from engine.models import positions_of
from engine.models.facts import ModelFiles
from engine.problems import load_section
from engine.stage import read_stage
from engine.tasks import REGISTRY, TaskConfig

MAX_LENGTH = 128
"""Tokens of a row where neither a stage.json nor the command says otherwise; that of a recipe."""


@dataclass(frozen=True)
class Subject:
    """What is judged."""

    name: str
    """Its path and what runs it, in words."""
    config: TaskConfig
    answers: Answers
    respond: Callable[[list[Row]], list[Answer]]


def evaluate(
    path: Path, data: list[str], settings: list[str], max_length: int | None, engine: str | None, threads: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judges a model on labelled rows.

    Args:
        path: a bundle, or a model directory.
        data: files, patterns or `hub:NAME`.
        settings: `key=value` of the task's section that differ in this data, as in `text=review`.
        max_length: tokens of a row; None: as in training. A bundle has its own.
        engine: of a bundle.
        threads: of ONNX Runtime.

    Returns:
        ({"model", "data", "rows", "metrics": {name: {"value", "low", "high"}}}, the predictions).

    Raises:
        UserError: no model that can be judged, or rows that cannot be read or hold classes that it does not know.
    """
    subject = open_subject(path, _pairs(settings), max_length, engine, threads)
    rows = SourceRows(load_section(SourceConfig, {"path": data}, "DATA"), Recipe.here(), subject.config.columns)
    found: list[Row] = list(rows)
    _require_known(subject, found)
    given = subject.respond(found)
    report = {
        "model": str(path),
        "engine": subject.name,
        "data": rows.describe,
        "rows": len(found),
        "metrics": {name: interval._asdict() for name, interval in judged(subject.answers, given, found).items()},
    }
    records = [_record(subject.answers, answer, row) for answer, row in zip(given, found, strict=True)]
    return report, records


def judged(answers: Answers, given: list[Answer], rows: list[Row]) -> dict[str, Interval]:
    """Returns every metric with its 95 % interval: Wilson's for a share of right rows, else the bootstrap's over rows."""

    def metrics(chosen_N: np.ndarray) -> dict[str, float]:
        return answers.metrics([given[index] for index in chosen_N], [rows[index] for index in chosen_N])

    found = bootstrap_metrics(metrics, len(rows))
    if answers.metric.counted:
        found[answers.metric.name] = accuracy_interval(answers.right(given, rows))
    return {name: interval for name, interval in found.items() if name != "examples"}


def open_subject(path: Path, changes: dict[str, Any], max_length: int | None, engine: str | None, threads: int | None) -> Subject:
    """Opens a bundle, an int8 stage or a model directory.

    Raises:
        UserError: it is none of them, or nothing says which task it does.
    """
    if (path / "manifest.json").is_file():
        return _of_bundle(path, changes, max_length, engine, threads)
    if engine is not None:
        raise UserError(f"{path}: --engine {engine}: only bundles hold engines")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: neither a bundle (manifest.json) nor a model directory (config.json)")
    record = read_stage(path)
    section = record["section"] if record is not None else {}
    task = {**section.get("task", {}), **changes}
    if "type" not in task:
        raise UserError(
            f"{path}: no stage.json says which task it does: --set type=… (known: {', '.join(sorted(REGISTRY.known()))})"
        )
    config = _config(task)
    positions = positions_of(ModelFiles(path).config) or MAX_LENGTH
    length = max_length or section.get("max_length") or min(MAX_LENGTH, positions)
    if record is not None and record["kind"] == "quantize":
        return _of_graphs(path, config, length, threads, wide=section.get("weights") == "8bit")
    return _of_model(path, config, length)


def _of_bundle(path: Path, changes: dict[str, Any], max_length: int | None, engine: str | None, threads: int | None) -> Subject:
    from engine.answers._batches import answer_all
    from export.serving.bundle import Bundle, mended

    if max_length is not None:
        raise UserError(f"{path}: --max-length {max_length}: a bundle has a length of its own, leave it out")
    bundle = Bundle.open(path, engine=engine, threads=threads)
    facts = {**bundle.answers.facts, "type": bundle.manifest.task.type}
    own = REGISTRY.module(bundle.manifest.task.type).Config.model_fields
    config = _config({key: value for key, value in {**facts, **changes}.items() if key in own or key in changes})
    answers = type(bundle.answers)({**facts, **config.model_dump(mode="json")}, bundle.answers.tokenizer)

    def respond(rows: list[Row]) -> list[Answer]:
        with mended():
            return answer_all(answers, bundle.run, rows, bundle.manifest.max_batch)

    return Subject(engine or "onnxruntime", config, answers, respond)


def _of_graphs(path: Path, config: TaskConfig, max_length: int, threads: int | None, wide: bool) -> Subject:
    from engine.answers._batches import answer_all
    from engine.data.batches import EVALUATION_BATCH
    from engine.tasks import task_of_model
    from export.compress.quantize import graph_file
    from export.engines.ort import OrtEngine
    from export.engines.parity import run_of

    task = task_of_model(config, path, max_length)
    run = run_of({name: OrtEngine(path / graph_file(name), threads, wide=wide) for name in task.graphs})
    return Subject("onnxruntime", config, task.answers, lambda rows: answer_all(task.answers, run, rows, EVALUATION_BATCH))


def _of_model(path: Path, config: TaskConfig, max_length: int) -> Subject:
    import torch

    from engine.evaluate import share_of_answers
    from engine.models.fitting import load_finished
    from engine.tasks import task_of_model

    task = task_of_model(config, path, max_length)
    model = load_finished(path, task).to("cuda" if torch.cuda.is_available() else "cpu")
    return Subject("torch", config, task.answers, lambda rows: share_of_answers(model, task, rows))


def _config(task: dict[str, Any]) -> TaskConfig:
    return load_section(REGISTRY.module(str(task["type"])).Config, task, "--set")


def _pairs(settings: list[str]) -> dict[str, Any]:
    pairs = [setting.partition("=") for setting in settings]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise UserError(f"--set {key}: write it as key=value, as in --set text=review --set label=stars")
    return {key: json.loads(value) if value.startswith(("{", "[")) else value for key, _, value in pairs}


def _require_known(subject: Subject, rows: list[Row]) -> None:
    """Raises UserError when a row is of a class that the model has never heard of."""
    labels = subject.answers.labels
    found = ((row, name) for row in rows for name in subject.config.classes_of(row)) if labels else ()
    for row, name in found:
        if name not in labels:
            where = f"{row.path}:{row.line}: " if isinstance(row, PlacedRow) else ""
            raise UserError(
                f"{where}label '{name}' is none of the model's{did_you_mean(str(name), labels)}: map it by --set 'names={{…}}'"
            )


def _record(answers: Answers, answer: Answer, row: Row) -> dict[str, Any]:
    placed = {"file": str(row.path), "line": row.line} if isinstance(row, PlacedRow) else {}
    return {**placed, **answers.record(answer, row)}


def write_predictions(target: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a row, complete or not at all.

    Raises:
        UserError: there is no such directory.
    """
    part = target.with_name(f".{target.name}.tmp")
    try:
        part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        part.rename(target)
    except FileNotFoundError:
        raise UserError(f"{target}: its directory does not exist") from None
    finally:
        part.unlink(missing_ok=True)


def table(report: dict[str, Any]) -> str:
    """Returns the report in words, a line each."""
    metrics = report["metrics"]
    width = max(map(len, metrics))
    lines = [f"{report['model']} ({report['engine']})", *report["data"], f"{report['rows']:,} rows; 95 % intervals"]
    lines += [f"{name:<{width}}  {m['value']:8.4g}  {m['low']:.4g} to {m['high']:.4g}" for name, m in metrics.items()]
    return "\n".join(lines)
