"""`bothways plan`: what every training stage needs in memory under each ZeRO level, before anything runs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from engine.config import Recipe
from engine.data.batches import accumulation_steps
from engine.errors import UserError
from engine.gpu import gpus
from engine.stages.stage import Stage
from engine.training.config import TrainConfig
from engine.training.optim import hidden_matrices
from engine.training.zero import read_zero_config, zero_config_of
from launch.local import process_count
from launch.planning import footprint
from launch.planning.footprint import Measured
from launch.planning.memory import Level, Need, Setting
from launch.planning.subject import Subject, subject_of
from launch.recipe import KINDS

LEVELS = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"]
"""What is compared; the configuration of the stage is added when it is another one."""
RESERVE = 1.5 * 2**30
"""Bytes of a GPU that its context, NCCL and cuBLAS take: an assumption, not measured by us."""
FRAGMENTATION = 0.05
"""Share of a GPU that its allocator cannot use: an assumption, not measured by us."""
MOST_ROWS = 2**20
"""Where the search for the largest micro batch ends."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Returns the bytes that `80GB`, `24 GiB` or `1e9` says.

    Raises:
        UserError: no number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match and match[2].upper()
    if match is None or unit not in UNITS or not float(match[1]):
        raise UserError(f"--gpu-memory {text}: write a number with a unit, as in 80GB or 24GiB")
    return int(float(match[1]) * UNITS[unit])


@dataclass(frozen=True)
class Machine:
    """What the plan is made for."""

    ranks: int
    gpu: bool
    memory: int
    """Bytes per rank that the stage may use."""
    memory_in_words: str


@dataclass(frozen=True)
class LevelPlan:
    """One line of the table."""

    name: str
    need: Need
    fits: bool
    largest_micro_batch: int
    """Rows that fit at once; 0: not even one."""
    usable_micro_batch: int
    """The largest of them that divides the rank's share of the global batch; 0: none."""


@dataclass(frozen=True)
class StagePlan:
    """What is said about one stage."""

    name: str
    parameters: int
    split: str
    """How the global batch is spread, in words."""
    chosen: str | None
    """The level that the recipe names."""
    levels: list[LevelPlan]
    host_start: int
    """Bytes of host memory for loading the model, on one node, for all its ranks."""
    notes: list[str]


def _optimizer_bytes(train: TrainConfig, subject: Subject) -> float:
    """Returns bytes of optimizer state per parameter: two averages in fp32, two in 8 bits, or one for the matrices of Muon."""
    if train.optimizer == "adamw_8bit":
        return 2.06
    if train.optimizer != "muon":
        return 8
    with torch.device("meta"):
        model = subject.build()
    hidden = hidden_matrices(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return 8 - 4 * sum(sizes[name] for name in hidden) / sum(sizes.values())


def plan_stage(stage: Stage[Any], machine: Machine) -> StagePlan:
    """Returns what a training stage needs under each level.

    Raises:
        UserError: its batch cannot be shared out over the ranks, or its model cannot be found.
    """
    config, train = stage.config, stage.config.train
    micro, accumulation = accumulation_steps(train.batch_size, train.micro_batch_size, machine.ranks)
    precision = planned_precision(train.precision, machine.gpu)
    subject = subject_of(stage, "sdpa" if machine.gpu and not train.deterministic else "eager")
    measured = footprint.measure(subject.build, subject.loss, precision, train.gradient_checkpointing, machine.gpu)
    share = train.batch_size // machine.ranks
    setting = Setting(
        ranks=machine.ranks,
        accumulation=accumulation,
        optimizer_bytes=_optimizer_bytes(train, subject),
        weight_bytes=2 if precision == "fp16" else 4,
        gpu=machine.gpu,
        resident=subject.resident,
    )
    chosen = zero_config_of(config, machine.ranks)
    names = [*LEVELS, *([chosen] if chosen and chosen not in LEVELS else [])]
    levels = (
        [] if machine.ranks > 1 or precision == "fp16" else [plan_level("none", None, measured, setting, machine, micro, share)]
    )
    for name in names:
        try:
            zero = read_zero_config(stage.recipe.find_zero(name), train, micro, accumulation)["zero_optimization"]
        except UserError:
            if name == chosen:
                raise
            continue  # a level that the recipe cannot take, as offload with an 8-bit optimizer
        levels.append(plan_level(name, zero, measured, setting, machine, micro, share))
    split = f"batch {train.batch_size} = micro {micro} × ranks {machine.ranks} × accumulation {accumulation}; {precision}" + (
        ", gradient checkpointing" if train.gradient_checkpointing else ""
    )
    parameters = measured.parameters
    local = min(machine.ranks, gpus() or machine.ranks)
    return StagePlan(stage.name, parameters, split, chosen or "none", levels, 4 * parameters * local, subject.notes)


def plan_level(
    name: str, zero: dict[str, Any] | None, measured: Measured, setting: Setting, machine: Machine, micro: int, share: int
) -> LevelPlan:
    """Returns one line: the need at the micro batch of the recipe, and the largest micro batch that fits.

    Args:
        micro: rows of the recipe's micro batch.
        share: rows of the global batch that one rank works on.
    """

    def need(rows: int, accumulation: int) -> Need:
        return Level(zero, measured.at(rows), replace(setting, accumulation=accumulation)).peak()

    def largest_with(accumulation: int) -> int:
        return _largest(lambda rows: used(need(rows, accumulation), machine.gpu) <= machine.memory)

    largest = largest_with(1)
    if largest < share:
        largest = largest_with(2)  # gradients that wait for the next micro batch take memory of their own
    usable = max((rows for rows in range(1, min(largest, share) + 1) if share % rows == 0), default=0)
    mine = need(micro, setting.accumulation)
    return LevelPlan(name, mine, used(mine, machine.gpu) <= machine.memory, largest, usable)


def used(need: Need, gpu: bool) -> int:
    """Returns the bytes that count against a rank's memory: a CPU has one memory for device and host."""
    return need.total("device") if gpu else need.total("device", "host")


def _largest(fits: Callable[[int], bool]) -> int:
    if not fits(1):
        return 0
    low = 1
    while low < MOST_ROWS and fits(2 * low):
        low *= 2
    high = 2 * low
    while low < MOST_ROWS and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned_precision(precision: str, gpu: bool) -> str:
    """Returns `precision`, with `auto` decided for the machine that is planned for."""
    if precision != "auto":
        return precision
    if gpu:
        return "bf16"
    return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def machine_for(ranks: int, gpu_memory: str | None) -> Machine:
    """Returns what to plan for: GPUs when their memory is given or there are some here, else this machine's own memory."""
    if gpu_memory or torch.cuda.is_available():
        memory = parse_bytes(gpu_memory) if gpu_memory else torch.cuda.get_device_properties(0).total_memory
        words = f"{size(memory)} of each GPU, less {size(RESERVE)} for context and libraries and {FRAGMENTATION:.0%} (assumed)"
        return Machine(ranks, True, int(memory * (1 - FRAGMENTATION) - RESERVE), words)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = f"{size(memory)} of this machine, shared by {ranks} rank{'s' if ranks > 1 else ''}"
    return Machine(ranks, False, memory // ranks, words)


def plan_recipe(
    recipe: Recipe, stages: list[Stage[Any]], world_size: int | None, gpu_memory: str | None
) -> Iterator[tuple[StagePlan, Machine]]:
    """Yields the plan of every stage that trains; of those that differ by their seed alone, of the first one."""
    twins = {part for parts in recipe.seeded.values() for part in parts[1:]}
    for stage in stages:
        if KINDS[stage.kind].trains and stage.name not in twins:
            machine = machine_for(world_size or process_count(stage), gpu_memory)
            try:
                yield plan_stage(stage, machine), machine
            except UserError as error:
                raise recipe.error(f"stages.{stage.name}.{stage.kind}", f"stage '{stage.name}': {error}") from None


# What is shown.


def size(number: float) -> str:
    """Formats bytes in GiB or MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def table(plan: StagePlan) -> Table:
    """Returns the levels of a stage, one a line."""
    drawn = Table(box=None, header_style="bold", pad_edge=False)
    drawn.add_column("parallel")
    for column in ("parameters", "gradients", "optimizer", "activations", "buffers", "device", "host", "disk"):
        drawn.add_column(column, justify="right")
    drawn.add_column("fullest in")
    drawn.add_column("fits")
    drawn.add_column("largest micro batch", justify="right")
    for level in plan.levels:
        need = level.need
        groups = [size(need.group(group)) for group in ("parameters", "gradients", "optimizer", "activations", "buffers")]
        totals = [size(need.total(place)) if need.total(place) else "" for place in ("device", "host", "disk")]
        fitting = str(level.largest_micro_batch)
        if level.usable_micro_batch not in (0, level.largest_micro_batch):
            fitting += f" ({level.usable_micro_batch} divides the batch)"
        name = f"{level.name} *" if level.name == plan.chosen else level.name
        drawn.add_row(name, *groups, *totals, level.need.phase, "yes" if level.fits else "no", fitting)
    return drawn


def show(plan: StagePlan, machine: Machine, console: Console) -> None:
    """Prints the table of a stage and where the numbers of its own level come from."""
    console.print(f"[bold]{plan.name}[/bold]: {plan.parameters:,} parameters; {plan.split}", soft_wrap=True)
    console.print(f"per rank, against {machine.memory_in_words}; * is what the recipe says", soft_wrap=True, markup=False)
    console.print(table(plan))
    for level in plan.levels:
        if level.name == plan.chosen:
            console.print(f"{level.name} at its peak ({level.need.phase}):", markup=False)
            for item in level.need.items:
                place = "" if item.place == "device" else f" ({item.place})"
                console.print(f"  {item.group:<12}{size(item.bytes):>10}{place}  {item.formula}", markup=False, soft_wrap=True)
    console.print(
        f"host memory while the model is loaded: {size(plan.host_start)} on a node (4 × P × its ranks; also under stage 3, which "
        "splits it only then)",
        markup=False,
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def as_json(plan: StagePlan, machine: Machine) -> dict[str, Any]:
    """Returns a stage's plan for machines, in bytes, with the formula of every number at every level."""
    return {
        "stage": plan.name,
        "parameters": plan.parameters,
        "split": plan.split,
        "parallel": plan.chosen,
        "ranks": machine.ranks,
        "memory_per_rank": machine.memory,
        "host_memory_at_start": plan.host_start,
        "notes": plan.notes,
        "levels": {
            level.name: {
                "phase": level.need.phase,
                "device": level.need.total("device"),
                "host": level.need.total("host"),
                "disk": level.need.total("disk"),
                "fits": level.fits,
                "largest_micro_batch": level.largest_micro_batch,
                "usable_micro_batch": level.usable_micro_batch,
                "items": [vars(item) for item in level.need.items],
            }
            for level in plan.levels
        },
    }


def print_plan(
    path: Path, overrides: list[str], runs: Path, only: list[str], world_size: int | None, gpu_memory: str | None, machines: bool
) -> None:
    """The command: reads a recipe and prints the plan of its training stages.

    Raises:
        UserError: a bad recipe, or a stage that cannot be planned.
    """
    from engine.config import load_recipe
    from launch.pipeline import choose_stages
    from launch.recipe import load_stages

    recipe = load_recipe(path, overrides, runs)
    stages = choose_stages(load_stages(recipe), only)
    for stage in stages if only else []:
        if not KINDS[stage.kind].trains and stage.name not in recipe.seeded:
            raise UserError(f"--stage {stage.name}: it does not train, so there is nothing to plan")
    plans = plan_recipe(recipe, stages, world_size, gpu_memory)
    if machines:
        print(json.dumps([as_json(plan, machine) for plan, machine in plans], indent=1))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for number, (plan, machine) in enumerate(plans):
        if number:
            console.print()
        show(plan, machine, console)
