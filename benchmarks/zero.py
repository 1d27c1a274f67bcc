"""ZeRO levels against plain single-process training: losses, bytes of model state, and the memory that `bothways plan` foretells.

All runs are small BERT models over gloo on this machine. `--only fp32`, `--only bf16` or `--only memory` measures one part alone
and keeps the figures of the others that were measured at the same commit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.figures import HERE, ROOT, Figure, figure, head, merge_result
from engine.config import load_recipe
from engine.errors import UserError
from engine.gpu import gpus
from engine.stages.stage import Stage
from engine.training.zero import read_zero_config, zero_config_of
from launch.local import command
from launch.operators import needed_operators, prepare
from launch.recipe import KINDS

STEPS = 50
TIMEOUT = 300.0
VOCABULARY = 4096
TOPICS = 30
STATE_TABLE = HERE / "results" / "zero_state.csv"
LOSS_MODEL = {"layers": 2, "hidden": 128, "heads": 4, "positions": 64}
MEMORY_MODEL = {"layers": 4, "hidden": 512, "heads": 8, "positions": 128}


class Run(NamedTuple):
    """How one training is spread."""

    parallel: str | None
    ranks: int = 1
    micro: int | None = None
    precision: str = "fp32"
    gradient_checkpointing: bool = False

    def __str__(self) -> str:
        micro = f" × micro {self.micro}" if self.micro else ""
        kept = " + gradient checkpointing" if self.gradient_checkpointing else ""
        return f"{self.parallel or 'plain'}, {self.ranks} ranks{micro}, {self.precision}{kept}"

    @property
    def overrides(self) -> list[str]:
        """The run as `--set` of the recipe."""
        return [
            f"base.parallel={self.parallel or 'null'}",
            f"base.processes={self.ranks}",
            f"base.train.micro_batch_size={self.micro or 'null'}",
            f"base.train.precision={self.precision}",
            f"base.train.gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
        ]


PLAIN = Run(None)
LEVELS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"]
SAME_BATCH = [
    *(Run(level, 2) for level in LEVELS),
    Run("zero3_hpz", 2),
    # One global batch of 8 rows, spread over ranks × accumulation steps.
    Run(None, 1, 1),
    Run("zero2", 2, 1),
    Run("zero3", 2, 2),
    Run("zero2", 4, 2),
    Run("zero3", 4, 1),
]
BF16 = [Run(None, precision="bf16"), *(Run(level, 2, precision="bf16") for level in LEVELS)]
MEMORY = [
    *(Run(f"zero{stage}", ranks, 4) for stage in (1, 2, 3) for ranks in (1, 2, 4)),
    Run(None, 1, 16),
    Run(None, 1, 16, gradient_checkpointing=True),
    Run(None, 1, 16, precision="bf16"),
    Run("zero0", 2, 8),
    Run("zero2", 2, 16),
    Run("zero3", 2, 16, gradient_checkpointing=True),
    Run("zero2_offload", 2, 8),
]


def write_work(directory: Path, model: dict[str, int], train: dict[str, Any], length: int) -> Path:
    """Writes rows of 1 to 40 words of one topic each and a pretraining recipe on them; returns the recipe."""
    rng = np.random.default_rng(0)
    words = np.asarray(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(3000)])
    # Some words are frequent, and every row has those of one topic, so that the context says something.
    topics = [words[number::TOPICS] for number in range(TOPICS)]
    shares = 1 / np.arange(1, len(words) // TOPICS + 1)
    shares /= shares.sum()
    rows = [" ".join(rng.choice(topics[number % TOPICS], rng.integers(1, 41), p=shares)) for number in range(1000)]
    (directory / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    base = {
        "model": model,
        "tokenizer": {"train": {"vocab_size": VOCABULARY}},
        "data": {"train": "rows.jsonl", "validation": "5%"},
        "sequence_length": length,
        "train": {"dropout": 0.0, "evaluate_every": STEPS, **train},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "zero", "stages": {"base": {"pretrain": base}}}))
    return path


def launch(
    recipe: Path, run: Run, runs: Path, part: str, overrides: list[str] | None = None, variables: dict[str, str] | None = None
) -> Path:
    """Runs the worker once as the recipe's stage would be, with further environment variables; returns its run directory.

    Raises:
        UserError: it failed; the end of its output is in the message.
    """
    overrides = [*run.overrides, *(overrides or [])]
    stage: Stage[Any] = Stage(load_recipe(recipe, overrides, runs), "base", KINDS["pretrain"].config)
    if zero_config_of(stage.config, run.ranks):
        path = stage.recipe.find_zero(zero_config_of(stage.config, run.ranks))
        prepare(needed_operators(read_zero_config(path, stage.config.train, 1, 1), cuda=gpus() > 0), print)
    module = KINDS["pretrain"].module
    parts = command(stage, overrides)
    at = parts.index(module)
    full = [*parts[:at], "benchmarks.zero_worker", part, *parts[at + 1 :]]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **({} if gpus() else {"DS_ACCELERATOR": "cpu"}),
        # Freed memory goes back at once and one arena serves all threads: what is resident is what is in use.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        **(variables or {}),
    }
    try:
        done = subprocess.run(full, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        tail, status = (done.stdout + done.stderr)[-2000:], done.returncode
    except subprocess.TimeoutExpired as error:
        tail, status = str(error), 1
    made = runs / "zero" / "base"
    if status and not (made / "stage.json").exists() and not (made / "rank0.json").exists():
        raise UserError(f"{run} failed: {tail}")
    return made


# Losses.


def write_tokenizer(recipe: Path) -> list[str]:
    """Learns one vocabulary for all runs; returns the overrides that name it."""
    from engine.data.vocabulary import learn_tokenizer

    directory = recipe.parent / "tokenizer"
    lines = (recipe.parent / "rows.jsonl").read_text().splitlines()
    learn_tokenizer("wordpiece", lambda: (json.loads(line)["text"] for line in lines), VOCABULARY, True, directory)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return ["base.tokenizer=tokenizer"]


def losses_of(
    recipe: Path, run: Run, directory: Path, overrides: list[str], variables: dict[str, str] | None = None
) -> np.ndarray:
    """Returns the training loss of each step, in nats a predicted token, shape (STEPS,)."""
    made = launch(recipe, run, directory, "losses", overrides, variables)
    records = [json.loads(line) for line in (made / "history.jsonl").read_text().splitlines()]
    losses = np.asarray([record["loss"] for record in records if "loss" in record])
    if len(losses) != STEPS:
        raise UserError(f"{run}: {len(losses)} losses instead of {STEPS}")
    return losses


def measure_losses(precision: str, runs: list[Run], say: Any = print) -> dict[str, Figure]:
    """Trains 50 steps in every way and compares each step's loss with plain fp32 training on one process."""
    # Differences of rounding grow with the learning rate: three times that of BERT's pretraining (arXiv:1810.04805).
    train = {"steps": STEPS, "batch_size": 8, "learning_rate": 3e-4, "keep": "last"}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_work(Path(scratch), LOSS_MODEL, train, 64)
        overrides = write_tokenizer(recipe)

        def losses(number: int, run: Run) -> np.ndarray:
            return losses_of(recipe, run, Path(scratch, f"runs{number}"), overrides)

        plain = losses(0, PLAIN)
        say(f"{PLAIN}: loss {plain[0]:.4f} → {plain[-1]:.4f}")
        worst = 0.0
        for number, run in enumerate(runs, 1):
            difference = float(np.abs(losses(number, run) - plain).max())
            worst = max(worst, difference)
            say(f"{run}: largest difference {difference:.2e}")
    return {f"loss_diff_{precision}_max": figure(worst, "nats", len(runs))}


# Memory.


def theory(stage: int, ranks: int, parameters: int) -> int:
    """Returns the bytes of model state per rank by the ZeRO paper (arXiv:1910.02054), with fp32 weights and gradients.

    Weights 4, gradients 4, optimizer 12 (an fp32 copy of the weights and Adam's two averages) bytes a parameter, each divided by
    the ranks where the stage splits it.
    """
    weights = 4 / (ranks if stage == 3 else 1)
    gradients = 4 / (ranks if stage >= 2 else 1)
    return round(parameters * (weights + gradients + 12 / ranks))


def measure_memory(say: Any = print) -> dict[str, Figure]:
    """Measures state and peak of every run and compares them with theory and with the plan."""
    from launch.planning.plan import Machine, plan_stage, used

    ratios, states = [], []
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_work(Path(scratch), MEMORY_MODEL, {"steps": 3, "batch_size": 64, "learning_rate": 1e-4}, 128)
        for number, run in enumerate(MEMORY):
            made = launch(recipe, run, Path(scratch, f"runs{number}"), "memory")
            ranks = [json.loads((made / f"rank{rank}.json").read_text()) for rank in range(run.ranks)]
            stage: Stage[Any] = Stage(load_recipe(recipe, run.overrides), "base", KINDS["pretrain"].config)
            plan = plan_stage(stage, Machine(run.ranks, False, 2**40, ""))
            level = next(level for level in plan.levels if level.name == plan.chosen)
            planned, measured = used(level.need, gpu=False), max(rank["peak"] for rank in ranks)
            ratios.append(max(planned / measured, measured / planned))
            say(f"{run}: plan {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB, {planned / measured:.3f}")
            if run.parallel in ("zero1", "zero2", "zero3") and run.micro == 4:
                number_of = int(run.parallel[-1])
                held = max(rank["parameters"] + rank["gradients"] + rank["optimizer"] for rank in ranks)
                wanted = theory(number_of, run.ranks, plan.parameters)
                states.append({"stage": number_of, "ranks": run.ranks, **ranks[0], "theory": wanted, "ratio": held / wanted})
    write_states(states)
    return {
        "state_bytes_over_theory_max": figure(max(row["ratio"] for row in states), "ratio", len(states)),
        "plan_over_measured_max": figure(max(ratios), "ratio", len(ratios)),
    }


def write_states(rows: list[dict[str, Any]]) -> None:
    """Writes the table of model-state bytes per rank beside the result."""
    columns = ["stage", "ranks", "parameters", "gradients", "optimizer", "theory", "ratio"]
    with STATE_TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "ratio": f"{row['ratio']:.4f}"} for row in rows)


PARTS: dict[str, Callable[[], dict[str, Figure]]] = {
    "fp32": lambda: measure_losses("fp32", SAME_BATCH),
    "bf16": lambda: measure_losses("bf16", BF16),
    "memory": measure_memory,
}


def main(argv: list[str]) -> None:
    """Measures, and writes results/zero.json."""
    parser = argparse.ArgumentParser("python -m benchmarks zero", description=__doc__)
    parser.add_argument("--only", choices=list(PARTS), help="measure this part alone")
    chosen = parser.parse_args(argv)
    for name, measure in PARTS.items():
        if chosen.only in (None, name):
            print(merge_result("zero", "python -m benchmarks zero", head(), measure()))
