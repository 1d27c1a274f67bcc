"""The whole recipe: which kinds of stage there are, and the stages of a recipe in an order that works."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.config import ModelRef, Recipe, Strict, references
from engine.errors import did_you_mean
from engine.finetune import FinetuneConfig
from engine.pretrain import PretrainConfig
from engine.stage import Stage
from export.compress.distill import DistillConfig
from export.compress.prune import PruneConfig
from export.compress.quantize import QuantizeConfig
from export.export import ExportConfig


class Kind(NamedTuple):
    """A kind of stage."""

    module: str
    """Its entry point: `python -m MODULE RECIPE --stage NAME`."""
    config: type[Strict]
    """Class of its section."""
    trains: bool
    """Started by `accelerate launch`, on as many processes as its section says."""


KINDS = {
    "pretrain": Kind("engine.pretrain", PretrainConfig, True),
    "finetune": Kind("engine.finetune", FinetuneConfig, True),
    "distill": Kind("export.compress.distill", DistillConfig, True),
    "prune": Kind("export.compress.prune", PruneConfig, False),
    "quantize": Kind("export.compress.quantize", QuantizeConfig, False),
    "export": Kind("export.export", ExportConfig, False),
}


def load_stages(recipe: Recipe) -> list[Stage[Any]]:
    """Validates every section and returns the stages in the recipe's order, which is the order of running.

    Raises:
        UserError: an unknown kind, a bad section, or a stage that reads itself or a later one.
    """
    stages: list[Stage[Any]] = []
    for name, (kind, _) in recipe.stages.items():
        if kind not in KINDS:
            raise recipe.error(f"stages.{name}.{kind}", f"unknown kind of stage '{kind}'{did_you_mean(kind, list(KINDS))}")
        stage = Stage(recipe, name, KINDS[kind].config)
        earlier = [stage.name for stage in stages]
        for key, reference in references(stage.config):
            if isinstance(reference, ModelRef) and reference in recipe.stages and reference not in earlier:
                where = "itself" if reference == name else f"stage '{reference}', which comes later: move that stage up"
                raise recipe.error(f"stages.{name}.{kind}.{key}", f"stage '{name}' reads {where}")
        stages.append(stage)
    return stages
