"""Is a recipe ready to run? Every section, file and model that it names is looked at, without loading torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import ModelRef, Recipe, TokenizerRef, references
from engine.data.batches import accumulation_steps
from engine.data.cells import Cell, text_cell
from engine.data.sources import SourceConfig, SourceRows
from engine.errors import UserError
from engine.judging import require_column
from engine.models import positions_of
from engine.models.facts import ModelFiles
from engine.models.scratch import ScratchConfig
from engine.stages.stage import Stage
from engine.tasks import task_class
from engine.training.zero import read_zero_config, zero_config_of
from export.compress.distill import OTHER_TOKENS
from launch.check_families import check_families, origin_of
from launch.check_models import check_models
from launch.local import fewer_processes, process_count
from launch.nodes.place import Place
from launch.recipe import KINDS

FIRST_LINES = 500
"""Lines of every data file that are read; the stage itself reads them all before it begins."""
FEWEST_LINES = 20
"""Of many files that are one source, these many lines of each at least."""


def check_recipe(
    recipe: Recipe, stages: list[Stage[Any]], place: Place | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, str]:
    """Looks at everything that the stages name.

    Args:
        place: of this node, when it is known where the stages run.
        say: is told how every data file is laid out.

    Returns:
        {stage name: one line that says what the stage will do}.

    Raises:
        UserError: the first thing that would stop a stage.
    """
    said: dict[str, str] = {}
    looked_at: dict[str, set[str]] = {}
    told: set[str] = set()

    def tell(note: str) -> None:
        if note not in told:
            told.add(note)
            say(note)

    for stage in stages:
        for key, reference in references(stage.config):
            recipe.find(reference, f"stages.{stage.name}.{stage.kind}.{key}")
        notes = check_models(stage, _check_data(stage, looked_at, tell))
        check_families(recipe, stage)
        _check_length(recipe, stage)
        _check_tokens(recipe, stage)
        does = _training(stage, place) if KINDS[stage.kind].trains else f"reads {', '.join(_read(stage)) or 'texts'}"
        said[stage.name] = "; ".join([does, *notes])
    return said


def _check_data(stage: Stage[Any], looked_at: dict[str, set[str]], tell: Callable[[str], None]) -> set[str]:
    """Reads the first rows of every source; returns the names of the classes that they are labelled with.

    Args:
        looked_at: what is known already, by question.
        tell: is told how every data file is laid out.
    """
    found: set[str] = set()
    for source, columns in _sources(stage.config):
        question = repr((source, columns, getattr(stage.config, "task", None), stage.config.data.slices))
        if question not in looked_at:
            looked_at[question] = _check_rows(stage, source, columns, tell)
        found |= looked_at[question]
    return found


def _sources(config: Any) -> list[tuple[SourceConfig, dict[str, Cell]]]:
    """Returns every file of rows with the columns that its rows must fill."""
    if getattr(config, "data", None) is None:
        return []
    columns = config.task.columns if hasattr(config, "task") else {config.text: text_cell}
    transfer = getattr(config, "transfer", None)
    more = [(transfer, {transfer.text: text_cell})] if transfer else []
    return [(part, columns) for part in config.data.sources] + more


def _check_rows(stage: Stage[Any], source: SourceConfig, columns: dict[str, Cell], tell: Callable[[str], None]) -> set[str]:
    """Reads the first rows of a source; returns the names of their classes."""
    rows = SourceRows(source, stage.recipe, columns, FIRST_LINES)
    rows.lines = max(FEWEST_LINES, FIRST_LINES // len(rows.layouts))
    found = list(rows)
    for note in rows.describe:
        tell(note)
    task = getattr(stage.config, "task", None)
    if task is None or source is getattr(stage.config, "transfer", None):
        return set()
    data = stage.config.data
    if source is data.train:
        task.check_rows(found, rows.complete)
    if source is not data.train or data.cut:
        for row, column in itertools.product(found, data.slices):
            require_column(row, column, f"{row.path}:{row.line}: ")
    return {str(name) for row in found for name in task.classes_of(row)}


def _check_length(recipe: Recipe, stage: Stage[Any]) -> None:
    key = "sequence_length" if stage.kind == "pretrain" else "max_length"
    length: int = getattr(stage.config, key, 0)
    if hasattr(stage.config, "task"):
        try:
            stage.config.task.check_length(length)
        except UserError as error:
            raise recipe.error(f"stages.{stage.name}.{stage.kind}.task", str(error)) from None
    for name, reference in references(stage.config):
        if not isinstance(reference, ModelRef) or isinstance(reference, TokenizerRef):
            continue
        positions = _positions(recipe, reference)
        if positions and length > positions:
            where = f"stages.{stage.name}.{stage.kind}.{key}"
            fits = f"the {positions} positions of {name} '{reference}'"
            raise recipe.error(where, f"{where}={length} is above {fits}: set it to {positions} or less")


def _positions(recipe: Recipe, reference: ModelRef) -> int | None:
    """Returns how many tokens a model takes, through the stages that lead to it; None when that is not known yet."""
    origin = origin_of(recipe, reference)
    if isinstance(origin, Path):
        return positions_of(ModelFiles(origin).config)
    return origin.positions if isinstance(origin, ScratchConfig) else None


def _check_tokens(recipe: Recipe, stage: Stage[Any]) -> None:
    """Layers are matched token by token: teacher and student must then read alike."""
    student = stage.config.student.model if stage.kind == "distill" else None
    if student is None or not (stage.config.hidden or stage.config.attention or task_class(stage.config.task).aligned):
        return
    origins = [origin_of(recipe, reference) for reference in (stage.config.teacher, student)]
    tokens = [ModelFiles(origin).tokens for origin in origins if isinstance(origin, Path)]
    if len(tokens) == 2 and None not in tokens and tokens[0] != tokens[1]:
        where = f"stages.{stage.name}.{stage.kind}.student.model"
        raise recipe.error(where, f"{where}: {OTHER_TOKENS}")


def _training(stage: Stage[Any], place: Place | None) -> str:
    train = stage.config.train
    try:
        processes = process_count(stage, place)
        micro, accumulation = accumulation_steps(train.batch_size, train.micro_batch_size, processes)
        zero = zero_config_of(stage.config, processes)
        if zero:
            # Only the machine that runs the stage can say whether it is able to: this one may be a login node.
            read_zero_config(stage.recipe.find_zero(zero), train, micro, accumulation)
    except UserError as error:
        raise stage.recipe.error(f"stages.{stage.name}.{stage.kind}.train", f"stage '{stage.name}': {error}") from None
    length = f"{train.epochs:g} epoch{'' if train.epochs == 1 else 's'}" if train.epochs else f"{train.steps:,} steps"
    zero = f", {stage.config.parallel}" if stage.config.parallel else ""
    fewer = fewer_processes(stage, place)
    split = f"batch {train.batch_size} = micro {micro} × processes {processes} × accumulation {accumulation}{zero}"
    return f"{length}, {split}" + (f" ({fewer})" if fewer else "")


def _read(stage: Stage[Any]) -> list[str]:
    return list(dict.fromkeys(str(ref) for _, ref in references(stage.config) if isinstance(ref, ModelRef)))
