"""What a stage need not say again: `task`, `data` and `max_length` come from the stage whose model it reads.

It works on raw sections, before any of them is validated: a section reads the model that its key `teacher` or `model` names, and
passes on what it has when it has a task. Pretraining has none and takes none over: its data is plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

INHERITED = ("task", "data", "max_length")
"""Keys of a section that are inherited, each as a whole."""
SOURCES = ("teacher", "model", "models")
"""Keys that name the model whose stage is inherited from; the first that is there counts, and of several models the first."""


WITHOUT = "pretrain"
"""The kind of stage that inherits nothing."""


@dataclass(frozen=True)
class Origin:
    """Where a value was said."""

    stage: str
    """Name of the stage that says it itself, or the reference to a directory of an earlier run."""
    recorded: bool = False
    """It comes from the stage.json of an earlier run."""

    def __str__(self) -> str:
        return f"{self.stage}/stage.json" if self.recorded else f"stage '{self.stage}'"


@dataclass(frozen=True)
class Inheritance:
    """What one stage takes over."""

    values: dict[str, Any] = field(default_factory=dict)
    """Key to raw value, only keys that the section itself lacks."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Who says each of them."""
    offered: dict[str, Origin] = field(default_factory=dict)
    """Who says each key that could be inherited, also where the section says it itself."""
    reason: str = ""
    """Why nothing more is there to inherit."""


Stages = dict[str, tuple[str, dict[str, Any]]]
"""{stage name: (kind, raw section)} in the recipe's order."""


def inherit(stages: Stages, record: Callable[[str], dict[str, Any] | None]) -> dict[str, Inheritance]:
    """Returns what every stage inherits, through any number of stages.

    Args:
        stages: in the order of running: what comes later cannot be inherited from.
        record: returns the section in the stage.json of the directory that a reference names, None where there is none.
    """
    found: dict[str, Inheritance] = {}
    for name, (kind, section) in stages.items():
        if kind == WITHOUT:
            found[name] = Inheritance(reason="pretraining has no task")
            continue
        offered, values, reason = _offered(name, section, stages, found, record)
        mine = {key: value for key, value in values.items() if key not in section}
        found[name] = Inheritance(mine, {key: offered[key] for key in mine}, offered, reason)
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _offered(
    name: str, section: dict[str, Any], stages: Stages, found: dict[str, Inheritance], record: Callable[[str], Any]
) -> tuple[dict[str, Origin], dict[str, Any], str]:
    """Returns (who says each key that the model's stage passes on, the values, why there are no more)."""
    reference = next((named for key in SOURCES if isinstance(named := _first(section.get(key)), str)), None)
    if reference is None:
        return {}, {}, "this section reads no model that could pass it on"
    if reference == name:
        return {}, {}, "a stage cannot read itself"
    if reference in found:
        kind, source = stages[reference]
        before = found[reference]
        values = {**before.values, **{key: source[key] for key in INHERITED if key in source}}
        origins = {key: Origin(reference) if key in source else before.origins[key] for key in values}
        reason = f"stage '{reference}' ({kind}) has none"
    elif reference in stages:
        return {}, {}, f"stage '{reference}' comes later: move it up"
    else:
        recorded = record(reference) or {}
        values = {key: recorded[key] for key in INHERITED if key in recorded}
        origins = {key: Origin(reference, recorded=True) for key in values}
        reason = f"model '{reference}' is no stage of this recipe and no directory with the stage.json of a stage that has one"
    return (origins, values, reason) if "task" in values else ({}, {}, reason)
