"""`seeds: [1, 2, 3]` in a section: one stage a seed, and one that hands on the best of them, in place of the stage that says it.

It works on raw sections, before any of them is validated, as inheritance does.
"""

from __future__ import annotations

from typing import Any

KEY, SELECT = "seeds", "select"
"""The key of a section, and the kind of the stage that chooses."""

Stages = dict[str, tuple[str, dict[str, Any]]]
"""{stage name: (kind, raw section)} in the recipe's order."""


class SeedsError(ValueError):
    """A `seeds` that cannot be used; `stage` says whose."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage


def expand_seeds(stages: Stages, seed: int) -> tuple[Stages, dict[str, list[str]]]:
    """Writes out every stage that is to run with several seeds.

    `teacher` becomes `teacher-seed1`, `teacher-seed2`, …, each the same section with a `seed` of its own, and `teacher`, which
    selects among them.

    Args:
        seed: of the recipe; `seeds: 3` counts from it.

    Returns:
        (the stages, {stage that was written out: the stages of its seeds}).

    Raises:
        SeedsError: seeds that are none, or a stage by one of the new names.
    """
    found: Stages = {}
    parts: dict[str, list[str]] = {}
    for name, (kind, section) in stages.items():
        if KEY not in section:
            found[name] = (kind, section)
            continue
        rest = {key: value for key, value in section.items() if key != KEY}
        if "seed" in rest:
            raise SeedsError(name, "seed and seeds: say one of them")
        parts[name] = []
        for number in _seeds(name, section[KEY], seed):
            part = f"{name}-seed{number}"
            if part in stages:
                raise SeedsError(name, f"seeds would make a stage '{part}', which is there already: rename it")
            parts[name].append(part)
            found[part] = (kind, {**rest, "seed": number})
        found[name] = (SELECT, {"models": list(parts[name])})
    return found, parts


def _seeds(name: str, value: Any, seed: int) -> list[int]:
    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 0

    if whole(value):
        value = list(range(seed, seed + value))
    if not isinstance(value, list) or len(value) < 2 or not all(map(whole, value)) or len(set(value)) < len(value):
        raise SeedsError(name, f"seeds must be two or more different whole numbers, or how many, not {value!r:.60}")
    return value
