"""Sweeps: the values of `--sweep KEY=A,B,C`, each combination as a run of its own."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from engine.errors import UserError


@dataclass(frozen=True)
class Variant:
    """One combination of the values of a sweep."""

    suffix: str
    """What its run directory's name has after the recipe's name."""
    overrides: tuple[str, ...]
    """`a.b=c` settings."""


def expand_sweep(sweeps: list[str]) -> list[Variant]:
    """Returns every combination of the values, the last sweep's value changing first.

    Args:
        sweeps: `teacher.train.learning_rate=1e-5,3e-5`; a comma inside brackets belongs to the value, as in `betas=[0.9,0.99]`.

    Raises:
        UserError: no key or no values, a key or a combination that comes twice.
    """
    keys: list[str] = []
    choices: list[list[str]] = []
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = split_values(text)
        if not key or not equals or not all(values):
            raise UserError(f"--sweep {sweep}: write it as key=value,value, as in --sweep teacher.train.learning_rate=1e-5,3e-5")
        if key in ("name", *keys):
            raise UserError(f"--sweep {sweep}: " + ("the name tells the runs apart" if key == "name" else f"'{key}' comes twice"))
        keys.append(key)
        choices.append(values)
    variants = []
    for combination in itertools.product(*choices):
        pairs = list(zip(keys, combination, strict=True))
        suffix = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in pairs)
        variants.append(Variant(re.sub(r"[^A-Za-z0-9._-]+", "_", suffix), tuple(f"{key}={value}" for key, value in pairs)))
    names = [variant.suffix for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep {' --sweep '.join(sweeps)}: two combinations would both write to a run named …-{name}")
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
