"""The demo as a stranger meets it: `make demo` and `make test`, each in a fresh clone of HEAD with nothing installed or cached.

The figures of the models are read from that run; `--reuse RUN` shows those of an existing run and records nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import ROOT, Figure, figure, head, write_result
from engine.errors import UserError
from engine.intervals import Interval, paired_bootstrap_drop
from export.report.figures import report_json

RUN = Path("runs", "demo")
PRETRAINED, RANDOM = "downstream_pretrained", "downstream_random"


def fresh_environment(cache: Path) -> dict[str, str]:
    """Returns this environment without the virtual environment that runs this, and with empty caches."""
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    own = str(Path(sys.executable).parent) if sys.prefix != sys.base_prefix else None
    path = environment.get("PATH", os.defpath).split(os.pathsep)
    return {**environment, "PATH": os.pathsep.join(entry for entry in path if entry != own), "XDG_CACHE_HOME": str(cache)}


def timed_make(target: str, commit: str, directory: Path) -> float:
    """Clones the commit into `directory`, runs `make TARGET` there and returns the minutes that it took.

    Raises:
        UserError: it did not end with status 0.
    """
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(directory)], check=True)
    subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=directory, check=True)
    with tempfile.TemporaryDirectory() as cache:
        started = time.monotonic()
        status = subprocess.run(["make", target], cwd=directory, env=fresh_environment(Path(cache))).returncode
        minutes = (time.monotonic() - started) / 60
    if status:
        raise UserError(f"`make {target}` in a fresh clone of {commit[:8]} ended with status {status}: its output is above")
    return minutes


def verdicts(stage: Path) -> dict[str, list[Any]]:
    """Returns the ids of a stage's test rows and whether each was classified right, in the order of its file.

    Raises:
        UserError: the stage left no predictions.
    """
    path = stage / "predictions.jsonl"
    if not path.exists():
        raise UserError(f"{path}: missing: stage '{stage.name}' has not finished or has no test split")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {"id": [row["id"] for row in rows], "correct": [row["label"] == row["prediction"] for row in rows]}


def pretrain_gain(run: Path) -> tuple[Interval, int]:
    """Returns by how many points pretraining beats random initialisation on the same test rows, and their number."""
    pretrained, random = verdicts(run / PRETRAINED), verdicts(run / RANDOM)
    if pretrained["id"] != random["id"]:
        raise UserError(f"{run}: stages '{PRETRAINED}' and '{RANDOM}' were tested on different rows: give them the same data")
    gain = paired_bootstrap_drop(np.asarray(pretrained["correct"]), np.asarray(random["correct"]))
    return gain, len(pretrained["id"])


def model_figures(run: Path) -> dict[str, Figure]:
    """Returns the figures that a finished demo run gives.

    Raises:
        UserError: the run lacks a stage that they need.
    """
    report = report_json(run)
    stages = {stage["name"]: stage for stage in report["stages"]}
    engine = next((stage for stage in reversed(report["stages"]) if stage["kind"] == "export"), None)
    if engine is None or "teacher" not in stages or None in report["comparison"].values():
        raise UserError(f"{run}: no finished export stage that was compared with a stage 'teacher': run recipes/demo.yaml")

    def accuracy(stage: dict[str, Any]) -> Figure:
        test = stage["metrics"]["test"]
        return figure(Interval(test["accuracy"], test["accuracy_low"], test["accuracy_high"]), "%", test["examples"])

    def compared(key: str, unit: str) -> Figure:
        entry = report["comparison"][key]
        return figure(Interval(entry["value"], entry["low"], entry["high"]), unit, entry["n"])

    gain, examples = pretrain_gain(run)
    return {
        "teacher_accuracy": accuracy(stages["teacher"]),
        "engine_accuracy": accuracy(engine),
        "accuracy_drop_points": compared("accuracy_drop_points", "points"),
        "speedup_vs_torch_fp32": compared("speedup_vs_torch_fp32", "×"),
        "speedup_vs_onnx_fp32": compared("speedup_vs_onnx_fp32", "×"),
        "weight_bytes_ratio": figure(engine["weight_bytes"] / stages["teacher"]["weight_bytes"], "ratio"),
        "pretrain_gain_points": figure(gain, "points", examples),
    }


def main(argv: list[str]) -> None:
    """Measures, and writes results/demo.json."""
    parser = argparse.ArgumentParser("python -m benchmarks demo", description=__doc__)
    parser.add_argument("--reuse", type=Path, metavar="RUN", help="show the figures of an existing run; nothing is recorded")
    chosen = parser.parse_args(argv)
    if chosen.reuse:
        print(json.dumps(model_figures(chosen.reuse), indent=1, ensure_ascii=False))
        return
    commit = head().removesuffix("-dirty")
    figures: dict[str, Figure] = {}
    try:
        for target in ("demo", "test"):
            with tempfile.TemporaryDirectory() as directory:
                clone = Path(directory, "bothways")
                figures[f"{target}_minutes"] = figure(timed_make(target, commit, clone), "minutes")
                if target == "demo":
                    figures |= model_figures(clone / RUN)
    finally:
        # A failing test does not take along what the demo has measured before it.
        if figures:
            print(write_result("demo", "python -m benchmarks demo", commit, figures))
