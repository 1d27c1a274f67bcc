"""The points of a sweep: values of keys of a recipe, each combination, or a random choice of them, as a run of its own."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.randomness import generator

POINTS_FILE = "points.json"
RANGE = re.compile(r"([-+\d.eE]+)\.\.([-+\d.eE]+)")
"""`1e-5..1e-3`: any number between the two, as a random sweep draws it."""


@dataclass(frozen=True)
class Variant:
    """One combination of the values of a sweep."""

    suffix: str
    """What its run directory's name has after the recipe's name."""
    overrides: tuple[str, ...]
    """`a.b=c` settings."""


def expand_sweep(sweeps: Sequence[str], option: str = "--sweep") -> list[Variant]:
    """Returns every combination of the values, the last sweep's value changing first.

    Args:
        sweeps: `teacher.train.learning_rate=1e-5,3e-5`; a comma inside brackets belongs to the value, as in `betas=[0.9,0.99]`.
            Or one file of points.
        option: what the values were given by, for messages.

    Raises:
        UserError: no key or no values, a key or a combination that comes twice.
    """
    if len(sweeps) == 1 and "=" not in sweeps[0] and sweeps[0].endswith(".json"):
        return read_points(Path(sweeps[0]))
    choices = choices_of(sweeps, option)
    for key, values in choices.items():
        between = next((value for value in values if RANGE.fullmatch(value)), None)
        if between:
            raise UserError(f"{option} {key}={between}: a range is for random points: add --random N, or list values")
    return variants_of([dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())], option)


def draw_points(sweeps: Sequence[str], count: int, seed: int, option: str = "--set") -> list[Variant]:
    """Returns `count` random combinations, no two alike; fewer where there are no more.

    Args:
        sweeps: as of `expand_sweep`; `1e-5..1e-3` is a range: whole numbers between whole ones, others evenly by their logarithm
            where both ends are above 0.
        seed: of the choice; the first points of a longer sweep are those of a shorter one.

    Raises:
        UserError: as `expand_sweep`.
    """
    draws = {key: [_drawn(value, option) for value in values] for key, values in choices_of(sweeps, option).items()}
    points: dict[tuple[str, ...], dict[str, str]] = {}
    for turn in range(100 * count):
        rng = generator(seed, "sweep", turn)
        point = {key: values[rng.integers(len(values))](rng) for key, values in draws.items()}
        points.setdefault(tuple(point.values()), point)
        if len(points) == count:
            break
    return variants_of(list(points.values()), option)


def _drawn(value: str, option: str) -> Callable[[Any], str]:
    """Returns what draws one value: the value itself, or one of its range."""
    found = RANGE.fullmatch(value)
    if not found:
        return lambda rng: value
    try:
        low, high = (float(end) for end in found.groups())
    except ValueError:
        raise UserError(f"{option} {value}: a range goes from one number to another, as in 1e-5..1e-3") from None
    if not low < high:
        raise UserError(f"{option} {value}: a range begins with its smaller end")
    if all(re.fullmatch(r"[-+]?\d+", end) for end in found.groups()):
        return lambda rng: str(rng.integers(int(low), int(high) + 1))
    if low > 0:
        return lambda rng: f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}"
    return lambda rng: f"{rng.uniform(low, high):.3g}"


def choices_of(sweeps: Sequence[str], option: str) -> dict[str, list[str]]:
    """Returns {key: values}.

    Raises:
        UserError: no key or no values, a key that comes twice.
    """
    found: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = split_values(text)
        if not key or not equals or not all(values):
            raise UserError(
                f"{option} {sweep}: write it as key=value,value, as in {option} teacher.train.learning_rate=1e-5,3e-5"
            )
        if key in ("name", *found):
            raise UserError(
                f"{option} {sweep}: " + ("the name tells the runs apart" if key == "name" else f"'{key}' comes twice")
            )
        found[key] = values
    return found


def variants_of(points: list[dict[str, str]], option: str) -> list[Variant]:
    """Returns each point with the name of its run.

    Raises:
        UserError: two of them would have the same name.
    """
    variants = []
    for point in points:
        suffix = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
        settings = tuple(f"{key}={value}" for key, value in point.items())
        variants.append(Variant(re.sub(r"[^A-Za-z0-9._-]+", "_", suffix), settings))
    names = [variant.suffix for variant in variants]
    for name in names:
        if names.count(name) > 1:
            said = f" {option} ".join("=".join((key, ",".join({p[key]: None for p in points}))) for key in points[0])
            raise UserError(f"{option} {said}: two combinations would both write to a run named …-{name}")
    return variants


def split_values(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def write_points(directory: Path, variants: list[Variant]) -> Path:
    """Writes the points into a directory and returns the file, which `--sweep` takes in place of values."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / POINTS_FILE
    part = path.with_suffix(".tmp")
    part.write_text(
        json.dumps([{"run": v.suffix, "set": list(v.overrides)} for v in variants], indent=1) + "\n", encoding="utf-8"
    )
    part.rename(path)
    return path


def read_points(path: Path) -> list[Variant]:
    """Returns the points of a file.

    Raises:
        UserError: it is not there, or no file of points.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        variants = [Variant(str(point["run"]), tuple(map(str, point["set"]))) for point in found]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of points (`bothways sweep … --points-only` writes one)") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a file of points: write it by `bothways sweep … --points-only`") from None
    if not variants or not all(re.fullmatch(r"[A-Za-z0-9._-]+", variant.suffix) for variant in variants):
        raise UserError(f"{path}: not a file of points: write it by `bothways sweep … --points-only`")
    return variants
