"""`bothways check --show`: the recipe as it will run, as YAML that is itself a recipe."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from engine.config import Recipe
from engine.recipe_yaml import FLOAT
from engine.stages.stage import Stage


class _Dumper(yaml.SafeDumper):
    """Writes every value out, and quotes text that a recipe would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", *FLOAT)


def show_recipe(recipe: Recipe, stages: list[Stage[Any]]) -> str:
    """Returns the recipe with its overrides applied and what each stage inherits written out; comments say from where.

    Read again it is the same work: the same sections, the same fingerprints. Relative paths still start at the directory of the
    recipe that is shown.
    """
    lines = [_entry("name", recipe.name), _entry("seed", recipe.seed), "stages:\n"]
    for stage in stages:
        lines.append(f"  {flow(stage.name)}:\n    {stage.kind}:\n")
        origins = recipe.inherited[stage.name].origins
        for key, value in recipe.full_section(stage.name, list(type(stage.config).model_fields)).items():
            if key in origins:
                lines.append(f"      # inherited from {origins[key]}\n")
            lines.append(textwrap.indent(_entry(key, value), " " * 6))
    return "".join(lines)


def _entry(key: str, value: Any) -> str:
    """Returns one `key: value`; a mapping or a list of plain values stays on the line."""
    nested = isinstance(value, (dict, list)) and any(
        isinstance(item, (dict, list)) for item in (value.values() if isinstance(value, dict) else value)
    )
    return f"{key}:\n{textwrap.indent(_dump(value), '  ')}" if nested else f"{key}: {flow(value)}\n"


def flow(value: Any) -> str:
    """Returns a value on one line, quoted where a recipe would read it as something else."""
    return _dump([value], flow=True).strip()[1:-1]


def _dump(value: Any, flow: bool | None = None) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=10**9)
