"""Entities on public sets, without and with a CRF, intents and slots, and answers to questions, each judged once on test rows.

The sets are not part of this project: `--data DIR` names a directory with wnut17/, snips/ and squad_by_article/ (SQuAD 1.1 cut
by articles), and cluener/ for `--multilingual MODEL`, in their own formats. `--only NAME` measures one of them and keeps the
figures of the same commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure, figure, head, merge_result
from benchmarks.finetune_quality import MODEL, Case, arguments, run_stage
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval

TAGGING: dict[str, Any] = {"type": "tagging", "unread": "skip"}
SETS = {
    "wnut17": Case(TAGGING, "wnut17/train.conll", "wnut17/test.conll", 10, learning_rate=2e-4, metric="f1", batch_size=16),
    "cluener": Case(
        {**TAGGING, "borders": "widen", "overlaps": "longest"},
        "cluener/train.jsonl",
        "cluener/dev.jsonl",
        6,
        learning_rate=1e-4,
        metric="f1",
    ),
    "snips": Case(
        {"type": "intent_slots", "crf": True, "unread": "skip", "metric": "slot_f1"},
        "snips/train.jsonl",
        "snips/test.jsonl",
        10,
        learning_rate=3e-4,
        metric="slot_f1",
        max_length=64,
    ),
    "squad_cut": Case(
        {"type": "question_answering"},
        "squad_by_article/train.json",
        "squad_by_article/test.json",
        3,
        learning_rate=1.5e-4,
        metric="f1",
        max_length=256,
        batch_size=16,
    ),
}
HEADS = {"f1_softmax": ({"crf": False}, "f1"), "f1_crf": ({"crf": True}, "f1")}
FIGURES: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "wnut17": HEADS,
    "cluener": HEADS,
    "snips": {"intent": ({}, "intent_accuracy"), "slot_f1": ({}, "slot_f1"), "exact": ({}, "exact")},
    "squad_cut": {"f1": ({}, "f1"), "em": ({}, "exact_match")},
}
"""Of each set: {figure: (what it changes in the task, the metric that it is)}; equal changes are trained once."""
SHARES = ("exact", "intent_accuracy")
"""Metrics that are shares of right rows."""


def run_name(name: str, changes: dict[str, Any]) -> str:
    """Returns the name of the run that trains a set with some changes of its task."""
    return "_".join(["structured", name, *(f"{key}_{value}" for key, value in changes.items())])


def measured(case: Case, data: Path, model: str, changes: dict[str, Any], metric: str, runs: Path, name: str) -> Figure:
    """Trains and returns a metric on the test rows, with its interval where one is kept."""
    section = case._replace(task={**case.task, **changes}).section(data, model)
    run = run_name(name, changes)
    metrics = run_stage({"finetune": section}, runs, run)["metrics"]["test"]
    ends = [metrics[f"{metric}_{end}"] for end in ("low", "high") if f"{metric}_{end}" in metrics]
    rows = int(metrics["examples"])
    value = Interval(metrics[metric], *ends) if ends else metrics[metric]
    if metric in SHARES:
        value = accuracy_interval(np.arange(rows) < round(rows * metrics[metric] / 100))
    return figure(value, "%", rows)


def main(argv: list[str]) -> None:
    """Measures, and writes results/structured_quality.json."""
    parser = arguments("structured_quality", __doc__)
    parser.add_argument("--multilingual", metavar="MODEL", help="directory of a multilingual or Chinese encoder, for cluener")
    chosen = parser.parse_args(argv)
    data = chosen.data.resolve()
    for name in chosen.only or [name for name in SETS if name != "cluener" or chosen.multilingual]:
        if name not in SETS:
            raise UserError(f"no set '{name}'{did_you_mean(name, list(SETS))}")
        model = chosen.multilingual if name == "cluener" else MODEL
        if model is None:
            raise UserError("cluener is Chinese: name an encoder that knows it with --multilingual DIR")
        if not (data / SETS[name].train).is_file():
            raise UserError(f"{data / SETS[name].train}: no such file: --data names a directory with the sets")
        for key, (changes, metric) in FIGURES[name].items():
            score = measured(SETS[name], data, model, changes, metric, chosen.runs, name)
            command = f"python -m benchmarks structured_quality --data {data.name}"
            print(merge_result("structured_quality", command, head(), {f"{name}_{key}": score}))
