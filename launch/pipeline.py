"""The stages of a recipe in order: what is finished and unchanged is skipped, the first failure stops the chain."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engine.config import Recipe, load_recipe
from engine.errors import UserError, did_you_mean
from engine.stages.stage import SHARED, Stage, digest, read_stage
from launch.check import check_recipe
from launch.local import run_stage
from launch.nodes.follow import Follower
from launch.nodes.link import Link, Report, host_name, leading
from launch.nodes.place import Place, Supervision
from launch.recipe import KINDS, load_stages
from launch.watchdog import NodeLife, StageError

FAILURE = "failure.txt"
"""Why an interrupted stage has stopped, in its working directory."""
PATIENCE = 30.0
"""Seconds to wait for the end of another run in the same directory, which may just have been killed."""


def run_recipe(
    path: Path,
    overrides: list[str] | None = None,
    runs: Path = Path("runs"),
    only: list[str] | None = None,
    restart: bool = False,
    console: Console | None = None,
    place: Place | None = None,
    supervision: Supervision | None = None,
) -> None:
    """Runs the stages of a recipe that are not finished.

    Several nodes run the training stages together. Node 0 runs the others alone, and keeps the run directory to itself.

    Args:
        path: the recipe.
        overrides: `a.b=c` settings.
        runs: where run directories lie.
        only: run these stages alone; what they read must be finished.
        restart: throw interrupted runs of these stages away instead of going on from their checkpoints.
        console: where progress is told.
        place: of this node among several.
        supervision: how running stages are looked after.

    Raises:
        UserError: bad input; nothing has been written then.
        StageError: a stage crashed, was killed or was asked to stop.
    """
    # Without a terminal rich would wrap tables at 80 columns.
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    overrides = overrides or []
    recipe = load_recipe(path, overrides, runs)
    stages = load_stages(recipe)
    chosen = choose_stages(stages, only)
    place, supervision = place or Place(), supervision or Supervision()
    place.check(supervision)
    check_recipe(recipe, chosen, place)
    require_finished(recipe, chosen)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    setup = _setup(chosen, place)
    if place.rank:
        report = Report(NodeLife(place.rank, host_name()), setup)
        with Link(place, recipe.runs / recipe.name, report) as link:
            Follower(recipe, overrides, restart, place, supervision, link).run(say)
        return
    with contextlib.ExitStack() as context:
        context.enter_context(_alone_in(recipe.runs / recipe.name, console.print))
        link0 = None
        if place.several:
            link0 = context.enter_context(Link(place, recipe.runs / recipe.name, Report(NodeLife(0, host_name()), setup)))
            context.enter_context(leading(link0))
        ran = _run(chosen, restart, console, lambda stage: run_stage(stage, overrides, _indented(say), place, supervision, link0))
        _tidy(recipe, stages)
        console.print(summary(stages, ran))
        _report(recipe, stages, bool(ran), console)


def _run(chosen: list[Stage[Any]], restart: bool, console: Console, run: Callable[[Stage[Any]], None]) -> list[str]:
    """Runs what is not finished; returns the names of what has run."""
    ran: list[str] = []
    for number, stage in enumerate(chosen, 1):
        title = f"[{number}/{len(chosen)}] {stage.name} ({stage.kind})"
        if stage.finished():
            console.print(f"{title}: skipped, unchanged", markup=False)
            continue
        console.print(title, style="bold", markup=False)
        stage.restart = restart
        with _failure_kept(stage):
            run(stage)
        ran.append(stage.name)
    return ran


def _tidy(recipe: Recipe, stages: list[Stage[Any]]) -> None:
    """Removes what stages share once every one that trains is there and none is at work."""
    shared = recipe.directory(SHARED)
    if shared.exists() and all(
        read_stage(stage.directory) and not stage.partial.exists() for stage in stages if KINDS[stage.kind].trains
    ):
        shutil.rmtree(shared, ignore_errors=True)


def _indented(say: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: say(f"  {text}")


def _setup(chosen: list[Stage[Any]], place: Place) -> str:
    """Returns a digest of what all nodes have to agree on."""
    sections = {stage.name: stage.config.model_dump(mode="json") for stage in chosen}
    return digest({"nodes": place.nodes, "ranks": place.total, "sections": sections})


def choose_stages(stages: list[Stage[Any]], only: list[str] | None) -> list[Stage[Any]]:
    """Returns all stages, or those that are named, with the stages of their seeds.

    Raises:
        UserError: there is none of that name.
    """
    names = [stage.name for stage in stages]
    for name in only or []:
        if name not in names:
            raise UserError(f"--stage {name}: {stages[0].recipe.path} has no such stage{did_you_mean(name, names)}")
    return [stage for stage in stages if not only or {stage.name, stage.recipe.owner(stage.name)}.intersection(only)]


@contextlib.contextmanager
def _failure_kept(stage: Stage[Any]) -> Iterator[None]:
    """Leaves the reason of a failure beside the checkpoints of the stage."""
    note = stage.partial / FAILURE
    note.unlink(missing_ok=True)
    try:
        yield
    except (UserError, StageError) as error:
        with contextlib.suppress(OSError):  # nothing to go on from, or no space
            note.write_text(f"{error}\n", encoding="utf-8")
        raise


def require_finished(recipe: Recipe, chosen: list[Stage[Any]]) -> None:
    """Raises UserError when a chosen stage reads one that is neither chosen nor finished."""
    names = [stage.name for stage in chosen]
    for stage in chosen:
        for source in stage.upstream():
            if source not in names and read_stage(recipe.directory(source)) is None:
                raise UserError(f"--stage {stage.name}: it needs stage '{source}', which has not finished: add --stage {source}")


@contextlib.contextmanager
def _alone_in(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps every other `bothways run` out of a run directory; what was made for it and stayed empty is removed again.

    Raises:
        UserError: another run is at work there.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        _lock(handle, directory, say)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _lock(handle: int, directory: Path, say: Callable[[str], None]) -> None:
    give_up = time.monotonic() + PATIENCE
    told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise UserError(f"{directory}: another `bothways run` is at work there: wait for it or stop it") from None
            if not told:
                say(f"waiting for another run in {directory}")
                told = True
            time.sleep(0.5)


def summary(stages: list[Stage[Any]], ran: list[str]) -> Table:
    """Returns the closing table: every finished stage with its main figures."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("stage")
    table.add_column("kind")
    for name in ("seconds", "parameters", "weights MB"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for stage in stages:
        record = read_stage(stage.directory)
        if record is None:
            table.add_row(stage.name, stage.kind, "", "", "", "not run")
            continue
        seconds = f"{record['seconds']['this_run']:.0f}" if stage.name in ran else ""
        if "metrics" not in record:
            told = record["corpus"]["train"]
            table.add_row(stage.name, stage.kind, seconds, "", "", f"{told['tokens']:,} tokens, shards: {told['shards']:,}")
            continue
        size = f"{record['weight_bytes'] / 1e6:.1f}"
        table.add_row(stage.name, stage.kind, seconds, f"{record['parameters']:,}", size, _result(record))
    return table


def _result(record: dict[str, Any]) -> str:
    split = "test" if "test" in record["metrics"] else "validation"
    metrics = record["metrics"][split]
    metric = record.get("metric")
    if metric:
        shown = f"{split} {metric['name']} {metrics[metric['name']]:.2f} {metric['unit']}".rstrip()
        if of := record.get("spread", {}).get(split, {}).get(metric["name"]):
            shown += f" ({record['chosen']}; all {len(record['models'])}: {of['mean']:.2f} ± {of['sd']:.2f})"
    else:
        shown = f"{split} loss {metrics['loss']:.3f}"
        shown += f" (at first {metrics['initial_loss']:.3f})" if "initial_loss" in metrics else ""
    speedup = record.get("comparison", {}).get("speedup_vs_torch_fp32")
    return shown + (f", {speedup['value']:.1f} × faster" if speedup else "")


def _report(recipe: Recipe, stages: list[Stage[Any]], anew: bool, console: Console) -> None:
    """Writes the report once an export stage has finished, and says where it lies."""
    if not any(stage.kind == "export" and read_stage(stage.directory) for stage in stages):
        return
    from export.report.page import write_report

    directory = recipe.runs / recipe.name
    path = directory / "report.html"
    if anew or not path.exists():
        path = write_report(directory)
    console.print(f"report: {path}", markup=False, soft_wrap=True)
