"""What the held-out rows tell of a stage beside its score: slices, class by class, what is taken for what, the worst errors.

The stage left it in files (engine/judging.py); here it is only laid out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.intervals import Interval
from export.report import plots
from export.report.figures import Run, judged

OPEN = 12
"""Classes whose figures show at once, the worst ones; the others fold away."""
MATRIX = 20
"""Classes of a confusion matrix that can be read; of more, the most frequent confusions are listed."""
CONFUSIONS = 15


def insight_of(run: Run) -> dict[str, Any] | None:
    """Returns what the page shows of the last stage of the chain that has answered held-out rows; None: none has."""
    for name in reversed(run.chain()):
        record, directory = run.stages[name], run.directory / name
        score, kept = judged(record), read_judgement(directory / "mistakes.json")
        if score is None or score.split not in kept:
            continue
        mistakes = kept[score.split]
        slices = read_judgement(directory / "slices.json").get(score.split, {})
        classes = read_judgement(directory / "per_class.json").get(score.split, {})
        unit = f"{score.name}, {score.unit}" if score.unit else score.name
        return {
            "stage": name,
            "split": score.split,
            "slices": [{"column": column, "metrics": _metric_names(found), **found} for column, found in slices.items()],
            "classes": sorted(classes.items(), key=lambda item: item[1].get("f1", 0.0)),
            "open": OPEN,
            "figures": [
                *(_slice_figure(column, found, score.name, unit) for column, found in slices.items()),
                *_confusion_figure(mistakes["confusion"]),
                *(_points_figure(column, pairs) for column, pairs in mistakes["points"].items()),
            ],
            **_worst(mistakes),
        }
    return None


def read_judgement(path: Path) -> dict[str, Any]:
    """Returns what a stage kept of its splits, nothing where it kept none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: not JSON: the file is damaged; remove {path.parent} to run the stage again") from None
    return found if isinstance(found, dict) else {}


def _metric_names(found: dict[str, Any]) -> list[str]:
    return list(found["groups"][0]["metrics"]) if found["groups"] else []


def _worst(mistakes: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns and rows of the table of the worst errors."""
    rows = [{**row["inputs"], **{k: v for k, v in row.items() if k not in ("inputs", "off")}} for row in mistakes["worst"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    offs = [row["off"] for row in mistakes["worst"]]
    return {
        "columns": columns,
        "worst": [{"cells": row, "off": off} for row, off in zip(cells, offs, strict=True)],
        "off_by": mistakes["off_by"] or "off",
    }


def _shown(value: Any) -> Any:
    """Returns a value as text; pieces of a text as they are."""
    if isinstance(value, dict) and "pieces" in value:
        return value["pieces"]
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "–"
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _slice_figure(column: str, found: dict[str, Any], name: str, axis: str) -> dict[str, str]:
    worst = (found["worst"] or {}).get("value")
    groups = [(g["value"], Interval(**g["metrics"][name]), g["rows"], g["value"] == worst) for g in found["groups"]]
    caption = "95 % intervals; n rows each." + (" Marked: apart from the interval of all other rows." if worst else "")
    return {"title": f"By {column}", "caption": caption, "svg": plots.dots(f"slice {column}", axis, groups)}


def _confusion_figure(confusion: dict[str, Any] | None) -> list[dict[str, str]]:
    if confusion is None:
        return []
    labels, counts = confusion["labels"], [tuple(entry) for entry in confusion["counts"]]
    if len(labels) <= MATRIX:
        caption = "Rows: what is true; columns: what was answered. The shade is the share of the true class."
        return [{"title": "Confusion matrix", "caption": caption, "svg": plots.confusion(labels, counts)}]
    wrong = sorted(((rows, labels[true], labels[given]) for true, given, rows in counts if true != given), reverse=True)
    bars = [(f"{true} → {given}", rows) for rows, true, given in wrong[:CONFUSIONS]]
    if not bars:
        return []
    caption = f"True → answered; the {len(bars)} most frequent of {len(wrong)} kinds of confusion among {len(labels)} classes."
    return [{"title": "What is taken for what", "caption": caption, "svg": plots.counted("confusions", "rows", bars)}]


def _points_figure(column: str, pairs: list[list[float]]) -> dict[str, str]:
    caption = f"{len(pairs):,} rows; on the line the answer is the truth."
    return {"title": f"{column}: true and answered", "caption": caption, "svg": plots.scatter(f"points {column}", pairs)}
