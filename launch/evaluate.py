"""`bothways evaluate`: any saved model or bundle on new data, by the answering half that serves it.

A pretrained language model, which has no task, is judged in `launch.likelihood`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.answers import Answer, Answers, Row
from engine.config import Recipe
from engine.data.sources import PlacedRow, SourceConfig, SourceRows, placed
from engine.errors import UserError, did_you_mean
from engine.judging import intervals_of, judge_slices, require_column
from engine.models import positions_of
from engine.models.facts import ModelFiles
from engine.problems import load_section
from engine.stages.stage import read_stage
from engine.tasks import REGISTRY, TaskConfig
from launch.likelihood import evaluate_language_model
from launch.pairs import LAYOUT, pairs

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
    path: Path,
    data: list[str],
    settings: list[str],
    max_length: int | None,
    engine: str | None,
    threads: int | None,
    slices: Sequence[str] = (),
    layout: Sequence[str] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judges a model on labelled rows, or a pretrained language model on texts.

    Args:
        path: a bundle, or a model directory.
        data: files, patterns or `hub:NAME`.
        settings: `key=value` of the task's section that differ in this data, as in `text=review`.
        max_length: tokens of a row; None: as in training. A bundle has its own.
        engine: of a bundle.
        threads: of ONNX Runtime.
        slices: columns by whose values the rows are judged apart, and `length`.
        layout: `key=value` of how the files are laid out, as in `quoting=none`.

    Returns:
        ({"model", "data", "rows", "metrics": {name: {"value", "low", "high"}}, "metric": that of the task, "slices": see
        `judge_slices`}, the predictions). Of a language model "remarks", too: lines.

    Raises:
        UserError: no model that can be judged, or rows that cannot be read or hold classes that it does not know.
    """
    changes = pairs(settings, "--set", "text=review --set label=stars")
    source = load_section(SourceConfig, {**pairs(layout, *LAYOUT), "path": data}, "DATA")
    if (section := language_section(path, changes)) is not None and engine is None:
        return evaluate_language_model(path, section, source, changes, max_length, slices)
    subject = open_subject(path, changes, max_length, engine, threads)
    rows = SourceRows(source, Recipe.here(), subject.config.columns)
    found: list[Row] = []
    for row in rows:
        for column in slices:
            require_column(row, column, f"{row.path}:{row.line}: ")
        found.append(row)
    _require_known(subject, found)
    given = subject.respond(found)
    report = {
        "model": str(path),
        "engine": subject.name,
        "data": rows.describe,
        "rows": len(found),
        "metrics": {name: interval._asdict() for name, interval in intervals_of(subject.answers, given, found).items()},
        "metric": subject.answers.metric._asdict(),
        "slices": judge_slices(subject.answers, given, found, slices),
    }
    records = [_record(subject.answers, answer, row) for answer, row in zip(given, found, strict=True)]
    return report, records


def language_section(path: Path, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the section of the stage that made a pretrained language model, {} of a stranger's; None: it is something else.

    Raises:
        UserError: a language model that gives texts no likelihood.
    """
    if "type" in changes or (path / "manifest.json").is_file() or not (path / "config.json").is_file():
        return None
    record = read_stage(path)
    section: dict[str, Any] = record["section"] if record is not None else {}
    if "task" in section:
        return None
    from engine.likelihood import kind_of

    return None if kind_of(path) is None else section


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
            f"{path}: no stage.json says which task it does: --set type=… (known: {', '.join(sorted(REGISTRY.known()))}); "
            "and config.json names no language model"
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


def _require_known(subject: Subject, rows: list[Row]) -> None:
    """Raises UserError when the truth of a row cannot be read, or is of a class that the model has never heard of."""
    for row in rows:
        with placed(row):
            subject.answers.check(row)
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
    lines += report.get("remarks", [])
    lines += [f"{name:<{width}}  {_shown(metric)}" for name, metric in metrics.items()]
    for column, found in report["slices"].items():
        lines += ["", f"{report['metric']['name']} by {column}", *_slice_lines(found, report["metric"]["name"])]
    return "\n".join(lines)


def _shown(metric: dict[str, float]) -> str:
    return f"{metric['value']:8.4g}  {metric['low']:.4g} to {metric['high']:.4g}"


def _slice_lines(found: dict[str, Any], name: str) -> Iterator[str]:
    """Yields a line for every group, and one for the group that is worse than the rest."""
    width = max(len(group["value"]) for group in found["groups"])
    for group in found["groups"]:
        yield f"{group['value']:<{width}}  {_shown(group['metrics'][name])}  n={group['rows']:,}"
    if worst := found["worst"]:
        rest = worst["rest"]
        yield f"worse than the rest: {worst['value']} (all others: {rest['value']:.4g}, {rest['low']:.4g} to {rest['high']:.4g})"
