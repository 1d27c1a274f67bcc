"""F1 of entities on public sets, without and with a CRF, each judged once on its test or development rows.

The sets are not part of this project: `--data DIR` names a directory with wnut17/, and cluener/ for `--multilingual MODEL`, in
their own formats. `--only NAME` measures one of them and keeps the figures of the same commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, figure, head, merge_result
from benchmarks.finetune_quality import MODEL, Case, arguments, run_stage
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval

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
}
HEADS = {"softmax": False, "crf": True}


def measured(case: Case, data: Path, model: str, crf: bool, runs: Path, name: str) -> Figure:
    """Trains and returns the F1 of entities on the test rows, with its interval."""
    section = case._replace(task={**case.task, "crf": crf}).section(data, model)
    metrics = run_stage(section, runs, name)["metrics"]["test"]
    interval = Interval(metrics["f1"], metrics.get("f1_low", metrics["f1"]), metrics.get("f1_high", metrics["f1"]))
    return figure(interval, "%", int(metrics["examples"]))


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
        for kind, crf in HEADS.items():
            score = measured(SETS[name], data, model, crf, chosen.runs, f"structured_{name}_{kind}")
            command = f"python -m benchmarks structured_quality --data {data.name}"
            print(merge_result("structured_quality", command, head(), {f"{name}_f1_{kind}": score}))
