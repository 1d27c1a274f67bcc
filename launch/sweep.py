"""`bothways sweep`: a stage with every combination of some values, or a random choice of them, as one table.

Each point is a run of the recipe in a directory of its own, the same one that a Slurm array of these points writes to. What is
finished is not run again, and stages that the swept one reads are run once where the points leave them as they are.
"""

from __future__ import annotations

import csv
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Recipe, load_recipe
from engine.errors import PREEMPTED, UserError, did_you_mean
from engine.stages.stage import SHARED, Stage, read_stage
from launch.check import check_recipe
from launch.points import Variant, draw_points, expand_sweep, write_points
from launch.recipe import load_stages

OPTION = "--set"


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    variant: Variant
    recipe: Recipe
    stages: list[Stage[Any]]
    """The swept stage, the last, and those that it reads."""

    @property
    def settings(self) -> list[str]:
        """The overrides of its recipe."""
        return [*self.variant.overrides, f"name={self.recipe.name}"]


def points_of(path: Path, stage: str, values: Sequence[str], runs: Path, count: int | None, seed: int) -> list[Point]:
    """Returns the points of a sweep, each of them looked at as `bothways check` does.

    Args:
        path: the recipe.
        stage: whose keys are varied, and whose metric is compared.
        values: `train.learning_rate=1e-5,3e-5`; a key of another stage begins with that stage's name.
        runs: where run directories lie.
        count: so many random points; None: all combinations.
        seed: of their choice.

    Raises:
        UserError: bad values, or a point that would not run.
    """
    base = load_recipe(path, [], runs)
    known = [recipe_stage.name for recipe_stage in load_stages(base)]
    if stage not in known:
        raise UserError(f"--stage {stage}: {path} has no such stage{did_you_mean(stage, known)}")
    if not values:
        raise UserError("nothing to vary: say --set key=value,value, as in --set train.learning_rate=1e-5,3e-5")
    full = [_full_key(value, stage, base) for value in values]
    variants = expand_sweep(full, OPTION) if count is None else draw_points(full, count, seed, OPTION)
    points = []
    for variant in variants:
        recipe = load_recipe(path, [*variant.overrides, f"name={base.name}-{variant.suffix}"], runs)
        stages = _leading_to(stage, load_stages(recipe))
        check_recipe(recipe, stages)
        points.append(Point(variant, recipe, stages))
    return points


def _full_key(value: str, stage: str, recipe: Recipe) -> str:
    first = value.partition("=")[0].partition(".")[0]
    return value if first in (*recipe.stages, "seed", "stages", "name") else f"{stage}.{value}"


def _leading_to(name: str, stages: list[Stage[Any]]) -> list[Stage[Any]]:
    """Returns the stage of that name with all that it reads, in the order of running."""
    wanted = {name}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted.update(stage.upstream())
    return [stage for stage in stages if stage.name in wanted]


def run_points(
    points: list[Point], others: list[Recipe], run: Callable[[Point], None], say: Callable[[str], None]
) -> dict[str, str]:
    """Runs every point that is not finished; a point that fails does not stop the others.

    Args:
        others: recipes whose finished stages may be taken where they are the same work.
        run: runs the stages of a point.
        say: tells what happens.

    Returns:
        {name of the run: why it failed}.

    Raises:
        StageError: the sweep was asked to stop.
    """
    from launch.watchdog import StageError

    failed: dict[str, str] = {}
    for number, point in enumerate(points, 1):
        name = point.recipe.name
        say(f"point {number} of {len(points)}: {', '.join(point.variant.overrides)}")
        try:
            borrow(point.stages, others)
            run(point)
        except UserError as error:
            failed[name] = str(error)
        except StageError as error:
            if error.status in (PREEMPTED, 130, 143):
                raise
            failed[name] = str(error)
        if name in failed:
            say(f"point {number} failed: {failed[name]}")
        others = [point.recipe, *others]
    return failed


def borrow(stages: list[Stage[Any]], others: list[Recipe]) -> None:
    """Links stages that another run has finished and that are the same work here, as far as there are such."""
    for stage in stages:
        if stage.directory.is_symlink():
            stage.directory.unlink()
        if stage.partial.exists() or stage.directory.exists():
            if not stage.finished():
                return
            continue
        found = (recipe.directory(stage.name) for recipe in others)
        same = next((path for path in found if (read_stage(path) or {}).get("fingerprint") == stage.fingerprint), None)
        if same is None:
            return
        stage.directory.parent.mkdir(parents=True, exist_ok=True)
        stage.directory.symlink_to(same.resolve())


def table_of(points: list[Point], failed: dict[str, str]) -> list[dict[str, Any]]:
    """Returns a row for every point, best first: its values, the validation metric with its interval, and how it ended.

    Of a stage with `seeds` the metric is the mean over them, and the ends of the interval are a standard deviation away.
    """
    from export.report.figures import interval_of

    rows, higher = [], True
    for point in points:
        record = read_stage(point.stages[-1].directory)
        pairs = (setting.partition("=") for setting in point.variant.overrides)
        row: dict[str, Any] = {"run": point.recipe.name, **{key: value for key, _, value in pairs}}
        metric = record.get("metric") if record else None
        if record is None or metric is None:
            rows.append({**row, "state": failed.get(point.recipe.name, "not run" if record is None else "has no metric")})
            continue
        values, higher, name = record["metrics"]["validation"], metric["higher_is_better"], metric["name"]
        interval = interval_of(values, metric)
        assert interval is not None
        (value, low, high), ends = interval, "95 %"
        if "spread" in record:
            mean, sd = (record["spread"]["validation"][name][key] for key in ("mean", "sd"))
            value, low, high, ends = mean, mean - sd, mean + sd, f"sd of {len(record['models'])}"
        told = {"metric": name, "value": value, "low": low, "high": high, "ends": ends, "rows": int(values["examples"])}
        rows.append({**row, **told, "seconds": record["seconds"]["this_run"], "state": "finished"})
    sign = -1 if higher else 1
    return sorted(rows, key=lambda row: (row["state"] != "finished", sign * row.get("value", 0.0)))


def write_table(directory: Path, name: str, rows: list[dict[str, Any]]) -> list[Path]:
    """Writes sweep.csv, and sweep.html with the plot, and returns their paths."""
    from engine.intervals import Interval
    from export.report.page import write_page
    from export.report.plots import dots

    directory.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (directory / "sweep.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    done = [row for row in rows if row["state"] == "finished"]
    figure = ""
    if done:
        groups = [(_label(row), Interval(row["value"], row["low"], row["high"]), 0, False) for row in done]
        figure = dots("sweep", f"validation {done[0]['metric']}", groups)
    page = write_page(directory / "sweep.html", "sweep.html", {"name": name, "columns": columns, "rows": rows, "figure": figure})
    return [directory / "sweep.csv", page]


FIXED = ("run", "metric", "value", "low", "high", "ends", "rows", "seconds", "state")
"""Columns of the table beside the keys that are varied."""


def _label(row: dict[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row.items() if key not in FIXED)


def sweep(
    path: Path,
    stage: str,
    values: Sequence[str],
    runs: Path,
    count: int | None,
    seed: int,
    points_only: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Runs a sweep and returns its table; the files lie in `runs/<recipe>-sweep-<stage>/`.

    Args:
        points_only: write the points and run nothing.
        say: tells what happens.

    Raises:
        UserError: bad values, a point that would not run.
        StageError: the sweep was asked to stop.
    """
    points = points_of(path, stage, values, runs, count, seed)
    base = load_recipe(path, [], runs)
    directory = runs / f"{base.name}-sweep-{stage}"
    file = write_points(directory, [point.variant for point in points])
    if points_only:
        say(f"{file}: {len(points)} points; on a cluster: bothways launch {path} --slurm --stage {stage} --sweep {file}")
        return []
    from launch.pipeline import run_recipe

    def run(point: Point) -> None:
        run_recipe(path, point.settings, runs, [each.name for each in point.stages])
        shutil.rmtree(point.recipe.directory(SHARED), ignore_errors=True)  # else encoded rows would lie in the run of every point

    rows = table_of(points, run_points(points, [base], run, say))
    for written in write_table(directory, f"{base.name}: sweep of {stage}", rows):
        say(f"{written}: written")
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Returns the table for people, best first; the settings of the best point are those to go on with."""
    done = [row for row in rows if row["state"] == "finished"]
    keys = [key for key in rows[0] if key not in FIXED]
    head = [*(key.rpartition(".")[2] for key in keys), f"validation {done[0]['metric'] if done else ''}".strip(), "from to"]
    body = [[str(row[key]) for key in keys] + _figures(row) for row in rows]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in [head, *body]]
    if done:
        lines.append("best: " + " ".join(f"--set {shlex.quote(f'{key}={done[0][key]}')}" for key in keys))
    return "\n".join(lines)


def _figures(row: dict[str, Any]) -> list[str]:
    if row["state"] != "finished":
        return [row["state"][:60], ""]
    return [f"{row['value']:.4g}", f"{row['low']:.4g} to {row['high']:.4g} ({row['ends']})"]
