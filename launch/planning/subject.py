"""The model and the loss of a training stage, built from the recipe alone: stages that it reads need not have run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.config import ModelRef, Recipe
from engine.corpus import CorpusConfig
from engine.errors import UserError
from engine.models import load_model, load_tokenizer, set_dropout, size_of
from engine.models.companions import together
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives import ObjectiveConfig, objective_class
from engine.pretrain import PretrainConfig, rounded
from engine.stages.stage import Stage, read_stage
from engine.tasks import task_class
from launch.planning import footprint
from launch.planning.footprint import Build
from launch.recipe import KINDS


@dataclass(frozen=True)
class Subject:
    """A stage's model and its loss, without weights."""

    build: Build
    loss: footprint.Loss
    resident: int
    notes: list[str]


def subject_of(stage: Stage[Any], attention: str) -> Subject:
    """Returns what a training stage trains; an upstream stage that has not run is planned from its own section."""
    config, recipe = stage.config, stage.recipe
    notes: list[str] = []
    if stage.kind == "pretrain":
        objective = objective_class(config.objective)

        def of_objective(model: Any, rows: int) -> torch.Tensor:
            return objective.made_up_loss(config.objective, model, rows, config.sequence_length)

        build = _adapted(_new_model(stage.recipe, config, attention, objective.head), config.objective)
        return Subject(_with_dropout(build, config.train.dropout), of_objective, 0, notes)
    task, length = task_class(config.task), config.max_length

    def made_up(model: Any, rows: int) -> torch.Tensor:
        return task.made_up_loss(model, rows, length)

    if stage.kind == "finetune":
        build = _fine_tuned(recipe, config.model, task.head, attention, notes)
        return Subject(_with_dropout(build, config.train.dropout), made_up, 0, notes)
    student = config.student.model or config.teacher
    build = _fine_tuned(recipe, student, task.head, attention, notes)
    if config.student.layers is not None:
        build = _with_layers(build, config.student.layers)
    with torch.device("meta"):
        teacher = size_of(_fine_tuned(recipe, config.teacher, task.head, attention, [])())["weight_bytes"]
    return Subject(_with_dropout(build, config.train.dropout), made_up, teacher, notes)


def _adapted(build: Build, config: ObjectiveConfig) -> Build:
    objective = objective_class(config)

    def changed() -> Any:
        model = build()
        objective.require_family(model.config.model_type)
        objective.accompany(config, model, None)
        objective.adapt(model)
        return model

    return changed


def _new_model(recipe: Recipe, config: PretrainConfig, attention: str, head: str) -> Build:
    if isinstance(config.model, ModelRef):
        build = _fine_tuned(recipe, config.model, head, attention, [])
        return build if config.tokenizer is None else _extended(build, _vocabulary(recipe, config))
    shape, vocabulary = config.model, rounded(_vocabulary(recipe, config))
    return lambda: build_model(shape, head, vocabulary, {"pad_token_id": 0}, attention)


def _extended(build: Build, vocabulary: int) -> Build:
    """Returns a model with a row for each token, if it has not as many already."""

    def changed() -> Any:
        model = build()
        if vocabulary > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        return model

    return changed


def _vocabulary(recipe: Recipe, config: PretrainConfig | CorpusConfig) -> int:
    if config.tokenizer is not None and config.tokenizer.train:
        return config.tokenizer.train.vocab_size
    more = 0
    reference: ModelRef | ScratchConfig | None = None if config.tokenizer is None else config.tokenizer.model
    if isinstance(config, PretrainConfig):
        more = config.tokenizer.extend.count if config.tokenizer is not None and config.tokenizer.extend is not None else 0
        reference = reference or next((part.corpus for part in config.corpus), config.model)
    assert isinstance(reference, ModelRef)
    if reference in recipe.stages and read_stage(recipe.directory(reference)) is None:
        upstream = recipe.section(reference, KINDS[recipe.stages[reference][0]].config)
        if isinstance(upstream, (PretrainConfig, CorpusConfig)):
            return _vocabulary(recipe, upstream) + more
        raise UserError(f"{recipe.path}: the tokenizer of stage '{reference}' is known once that stage has run")
    return len(load_tokenizer(recipe.find_model(reference))) + more


def _fine_tuned(recipe: Recipe, reference: ModelRef, head: str, attention: str, notes: list[str]) -> Build:
    unfinished = reference in recipe.stages and read_stage(recipe.directory(reference)) is None
    if not unfinished:
        path = recipe.find_model(reference)
        return lambda: _padding(load_model(path, head, attention=attention, random=True))
    kind, _ = recipe.stages[reference]
    config: Any = recipe.section(reference, KINDS[kind].config)
    if kind == "pretrain":
        return _new_model(recipe, config, attention, head)
    if kind in ("prune", "factorize"):
        notes.append(f"stage '{reference}' has not run: planned with the model before {kind[:-1]}ing")
    source = (config.student.model or config.teacher) if kind == "distill" else config.model
    build = _fine_tuned(recipe, source, head, attention, notes)
    if kind == "distill" and config.student.layers is not None:
        return _with_layers(build, config.student.layers)
    return build


def _padding(model: Any) -> Any:
    """Returns a model that takes several rows: one without a padding token gets its tokenizer's when the stage starts."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0
    return model


def _with_layers(build: Build, layers: int | list[int]) -> Build:
    from export.compress.distill import shorten

    def smaller() -> Any:
        model = build()
        shorten(model, layers)
        return model

    return smaller


def _with_dropout(build: Build, probability: float | None) -> Build:
    """Masks of dropout are activations too; a probability of 0 has none."""

    def changed() -> Any:
        model = build()
        if probability is not None:
            for part in together(model):
                set_dropout(part, probability)
        return model

    return changed
