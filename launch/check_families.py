"""Can the models of a recipe do what its stages ask for? The family table is asked before anything is trained.

A model is known by the config.json that heads its chain of stages; a hub id is looked at when its stage starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import ModelRef, Recipe, TokenizerRef, references
from engine.errors import UserError
from engine.models.facts import ModelFiles
from engine.models.families import HEADS, check_kept, family_of, require, stack_sizes, trained_layers
from engine.models.scratch import ScratchConfig
from engine.objectives import objective_class
from engine.stages.stage import Stage
from engine.tasks import task_class
from export.compress.distill import OTHER_WIDTH, layers_to_keep
from launch.recipe import KINDS

SHRINKING = {"prune": ("heads", "neurons"), "factorize": ("attention", "ffn", "embeddings")}
"""Kinds of stages whose keys are operations of the family table."""


def check_families(recipe: Recipe, stage: Stage[Any]) -> None:
    """Raises UserError for the first thing that a model of this stage cannot do."""
    where = f"stages.{stage.name}.{stage.kind}"
    for key, reference, operation in _asked(stage):
        model_type = _about(recipe, reference).get("model_type")
        try:
            if model_type is not None:
                require(model_type, operation)
        except UserError as error:
            raise recipe.error(f"{where}.{key}", f"{where}.{key}: {error}") from None
    for key, check in (("student.layers", _check_kept), ("train.layers", _check_trained), ("heads", _check_heads)):
        try:
            check(recipe, stage)
        except UserError as error:
            raise recipe.error(f"{where}.{key}", f"{where}: {error}") from None
    if stage.kind == "distill" and stage.config.hidden:
        widths = [_width(_about(recipe, reference)) for reference in (stage.config.teacher, _learner(stage))]
        if None not in widths and widths[0] != widths[1]:
            raise recipe.error(f"{where}.hidden", f"{where}.hidden: {OTHER_WIDTH}")


def _asked(stage: Stage[Any]) -> Iterator[tuple[str, ModelRef, str]]:
    """Yields (key, model, operation) of everything that the family table may refuse."""
    config = stage.config
    operation = HEADS.get(task_class(config.task).head) if hasattr(config, "task") else None
    if stage.kind == "pretrain":
        operation = objective_class(config.objective).operation
    if operation is not None:
        models = [
            (key, reference)
            for key, reference in references(config)
            if isinstance(reference, ModelRef) and not isinstance(reference, TokenizerRef)
        ]
        yield from ((key, reference, operation) for key, reference in models)
    for key in SHRINKING.get(stage.kind, ()):
        if getattr(config, key) is not None:
            yield key, config.model, key
    if stage.kind == "distill":
        if config.student.layers is not None:
            yield "student.layers", _learner(stage), "layers"
        if config.attention:
            yield from (("attention", reference, "maps") for reference in (config.teacher, _learner(stage)))


def _learner(stage: Stage[Any]) -> ModelRef:
    """Returns the model that a stage trains."""
    return (stage.config.student.model or stage.config.teacher) if stage.kind == "distill" else stage.config.model


def _check_kept(recipe: Recipe, stage: Stage[Any]) -> None:
    keep = stage.config.student.layers if stage.kind == "distill" else None
    if keep is not None:
        for layers in _layers(recipe, _learner(stage)):
            check_kept(_about(recipe, _learner(stage)).get("model_type"), layers_to_keep(keep, layers))


def _check_trained(recipe: Recipe, stage: Stage[Any]) -> None:
    wanted = stage.config.train.layers if KINDS[stage.kind].trains else "all"
    if wanted == "all":
        return
    if getattr(stage.config, "shape", None):
        there = stage.config.shape.layers
    else:
        there = trained_layers(_about(recipe, _learner(stage)), _student_layers(recipe, stage))
    if there and wanted > there:
        raise UserError(f"train.layers={wanted}: the model has {there} layers: name fewer, or 'all' of it")


def _check_heads(recipe: Recipe, stage: Stage[Any]) -> None:
    keep: int | None = stage.config.heads if stage.kind == "prune" else None
    if keep is None:
        return
    about = _about(recipe, stage.config.model)
    for stack in family_of(about.get("model_type")).stacks:
        heads = about.get(stack.heads) or keep
        group = heads // (about.get(stack.key_heads) or heads)
        if keep > heads:
            raise UserError(f"heads={keep}: the model has only {heads} in each layer: lower it")
        if keep % group:
            raise UserError(f"heads={keep}: {group} heads share their keys and values: name a multiple of {group}")


def _about(recipe: Recipe, reference: ModelRef) -> dict[str, Any]:
    """Returns the config.json that heads the chain of a model; of a model from scratch its type, of a hub id nothing."""
    origin = origin_of(recipe, reference)
    if isinstance(origin, Path):
        return ModelFiles(origin).config
    return {"model_type": origin.family, "hidden_size": origin.hidden} if isinstance(origin, ScratchConfig) else {}


def _width(about: dict[str, Any]) -> int | None:
    return about.get(family_of(about.get("model_type")).hidden)


def origin_of(recipe: Recipe, reference: ModelRef) -> Path | ScratchConfig | str:
    """Returns where a model comes from, through the stages that lead to it: a directory, a new model or a hub id."""
    if reference not in recipe.stages:
        return recipe.find_model(reference)
    stage = _stage(recipe, reference)
    return getattr(stage.config, "shape", None) or origin_of(recipe, _learner(stage))


def _layers(recipe: Recipe, reference: ModelRef) -> list[int]:
    """Returns how many layers each stack of a model will have when its stage has run; empty where that is not known."""
    if reference in recipe.stages:
        return _student_layers(recipe, _stage(recipe, reference))
    origin = recipe.find_model(reference)
    return stack_sizes(ModelFiles(origin).config) if isinstance(origin, Path) else []


def _student_layers(recipe: Recipe, stage: Stage[Any]) -> list[int]:
    """Returns the same of the model that a stage makes."""
    if getattr(stage.config, "shape", None):
        return [stage.config.shape.layers]
    keep, layers = stage.config.student.layers if stage.kind == "distill" else None, _layers(recipe, _learner(stage))
    return layers if keep is None else [keep if isinstance(keep, int) else len(keep) for _ in layers]


def _stage(recipe: Recipe, name: str) -> Stage[Any]:
    return Stage(recipe, name, KINDS[recipe.stages[name][0]].config)
