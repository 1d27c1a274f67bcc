"""MRPC and RTE by Hugging Face's Trainer, with the weights and the settings of `finetune_quality`: what these weights can learn.

`--data DIR` names a directory with mrpc/ and rte/, as for `finetune_quality`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.figures import ROOT, Figure, figure, head, merge_result
from benchmarks.finetune_quality import MODEL, Case, chosen_cases
from engine.config import package_path


def accuracy(case: Case, data: Path) -> Figure:
    """Returns the accuracy on the test rows of a case."""
    settings = {
        "--model": package_path(MODEL),
        "--train": data / case.train,
        "--dev": data / case.test,
        "--epochs": case.epochs,
        "--max-length": case.max_length,
        "--learning-rate": case.learning_rate,
        "--batch-size": case.batch_size,
        "--seed": 1,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    words += [word for key in ("text", "text_pair") for word in ("--column", case.task[key])]
    command = [sys.executable, "-m", "benchmarks.hf_trainer", "dynamic", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return figure(json.loads(done.stdout.splitlines()[-1])["accuracy"], "%")


def main(argv: list[str]) -> None:
    """Measures, and writes results/glue_peer.json."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks glue_peer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with the sets")
    data = parser.parse_args(argv).data.resolve()
    command = f"python -m benchmarks glue_peer --data {data.name}"
    for name, case in chosen_cases([], data, ["mrpc", "rte"]):
        print(merge_result("glue_peer", command, head(), {f"{name}_accuracy": accuracy(case, data)}), flush=True)
