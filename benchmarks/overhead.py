"""What the engine costs: over a bare DeepSpeed loop, while a checkpoint is saved, and from a resume to the first step.

The work is the demo's pretraining: the same model, data and ZeRO level for both loops, in turns, on the same ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import ROOT, figure, head, write_result
from engine.config import load_recipe
from engine.intervals import median_interval, ratio_interval
from engine.pretrain import PretrainConfig
from engine.stages.stage import Stage, stage_main

STAGE = "pretrained"
TOTAL_STEPS = 100_000
BLOCK, ROUNDS, REPEATS = 5, 120, 7
OUTPUT = "BOTHWAYS_OVERHEAD_OUTPUT"
SETTINGS = [f"{STAGE}.train.steps={TOTAL_STEPS}", f"{STAGE}.data.train.share=10%"]


def bare_loop(fit: Any, steps: range) -> None:
    """Trains as one would with DeepSpeed alone, on the engine that `fit` has: the same weights, memory and optimizer."""
    processes, engine = fit.processes, fit.trainer.engine
    for step in steps:
        for batch in fit.batches.at(step, processes.rank, processes.processes, processes.micro):
            total, count = engine(batch)
            engine.backward(total / count)
            engine.step()


def measure(fit: Any) -> dict[str, Any]:
    """Returns the seconds of blocks of steps, of saves and of resumes, on this rank."""
    from engine.training.checkpoint import TrainState

    fit.tracker.start(None)
    fit.evaluate_every = fit.checkpoint_every = 10 * TOTAL_STEPS
    fit.state = TrainState()

    def ours(steps: range) -> None:
        for _ in steps:
            asked, problem = fit._step(fit.state)
            assert problem is None
            fit._after_step(asked)

    def timed(work: Any, *arguments: Any) -> float:
        fit.processes.barrier()
        started = time.perf_counter()
        work(*arguments)
        return time.perf_counter() - started

    blocks: dict[str, list[float]] = {"engine": [], "bare": []}
    for number in range(ROUNDS + 2):
        steps = range(number * BLOCK, (number + 1) * BLOCK)
        pair = {"engine": lambda steps=steps: ours(steps), "bare": lambda steps=steps: bare_loop(fit, steps)}
        for name in sorted(pair, reverse=bool(number % 2)):  # neither is always first
            seconds = timed(pair[name])
            if number >= 2:
                blocks[name].append(seconds)
    saves, resumes = [], {"1": [], "99": []}
    for _ in range(REPEATS):
        saves.append(timed(fit._save))
        fit.checkpoints.wait()
    for _ in range(REPEATS):
        for share in resumes:
            resumes[share].append(_resume(fit, TOTAL_STEPS * int(share) // 100, timed))
    fit.checkpoints.close()
    return {**blocks, "saves": saves, "resumes": resumes}


def _resume(fit: Any, step: int, timed: Any) -> float:
    """Saves as if the run stood at `step`, then measures from loading that checkpoint to the end of the first step."""
    if fit.processes.main:
        shutil.rmtree(fit.checkpoints.directory, ignore_errors=True)  # the newest would be taken, and that may be another one
    fit.processes.barrier()
    fit.state.step = step
    fit._save()
    fit.checkpoints.wait()
    fit.processes.barrier()
    for stream in fit.batches.order.streams:
        for cached in (stream._shards, stream._window, fit.batches._shard):
            cached.cache_clear()

    def work() -> None:
        fit.state = fit.checkpoints.resume(fit.trainer)
        assert fit.state.step == step
        fit._step(fit.state)

    return timed(work)


def run(stage: Stage[PretrainConfig]) -> None:
    """Measures on this rank in place of training."""
    from engine import pretrain
    from engine.training import loop

    def measured(self: Any) -> None:
        result = measure(self)
        if self.processes.main:
            Path(os.environ[OUTPUT]).write_text(json.dumps(result))
        self.processes.barrier()
        sys.exit(0)

    loop.Fit.run = measured  # type: ignore[method-assign,assignment]
    pretrain.run(stage)


def main(argv: list[str]) -> None:
    """Measures, and writes results/overhead.json."""
    argparse.ArgumentParser("python -m benchmarks overhead", description=__doc__).parse_args(argv)
    from launch.local import run_stage
    from launch.recipe import KINDS, load_stages

    KINDS["pretrain"] = KINDS["pretrain"]._replace(module="benchmarks.overhead")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[OUTPUT] = str(Path(scratch, "seconds.json"))
        recipe = load_recipe(ROOT / "recipes" / "demo.yaml", SETTINGS, scratch)
        stage = next(stage for stage in load_stages(recipe) if stage.name == STAGE)
        run_stage(stage, SETTINGS, print)
        found = json.loads(Path(os.environ[OUTPUT]).read_text())
    ratio = ratio_interval(np.asarray(found["engine"]), np.asarray(found["bare"]))
    resumes = found["resumes"]
    figures = {
        "engine_over_bare_loop": figure(ratio, "ratio", ROUNDS),
        "step_seconds": figure(median_interval(np.asarray(found["engine"]) / BLOCK), "s", ROUNDS),
        "save_blocks_seconds": figure(median_interval(np.asarray(found["saves"])), "s", REPEATS),
        "resume_seconds_at_1_percent": figure(median_interval(np.asarray(resumes["1"])), "s", REPEATS),
        "resume_seconds_at_99_percent": figure(median_interval(np.asarray(resumes["99"])), "s", REPEATS),
    }
    print(write_result("overhead", "python -m benchmarks overhead", head(), figures))


if __name__ == "__main__":
    stage_main("benchmarks.overhead", PretrainConfig, run)
