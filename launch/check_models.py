"""What `bothways check` sees in the files of a model that a recipe names: weights, configuration, tokenizer, classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import ModelRef, TokenizerRef, references
from engine.data.vocabulary import NOT_EXTENDED
from engine.errors import UserError
from engine.models.facts import ModelFiles, class_names, listed, named, names_hint, other_head, read_json
from engine.objectives import Objective, objective_class
from engine.stages.stage import Stage, read_stage
from engine.tasks import task_class

GENERIC = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that know no special tokens but those that their files name."""
TRAINED = {"pretrain": "model", "finetune": "model", "distill": "student.model"}
"""The key of each kind of stage whose model goes on learning: what its weights lack is made new."""


def check_models(stage: Stage[Any], classes: set[str]) -> list[str]:
    """Looks into every model directory that a stage names; stages of the recipe are not there yet, hub ids not here.

    Args:
        classes: names that the first rows are labelled with; empty where the task has none.

    Returns:
        what will be done about a model that does not fit as it is, a line each.

    Raises:
        UserError: names the recipe's line, the file and the fix.
    """
    notes = []
    for key, reference, path in _directories(stage):
        try:
            notes += [f"{key} '{reference}': {note}" for note in _check_model(ModelFiles(path), stage, key, reference, classes)]
        except UserError as error:
            raise stage.recipe.error(f"stages.{stage.name}.{stage.kind}.{key}", str(error)) from None
    return notes


def _directories(stage: Stage[Any]) -> Iterator[tuple[str, ModelRef, Path]]:
    """Yields (key, reference, directory) of every model directory."""
    for key, reference in references(stage.config):
        path = stage.recipe.find(reference, f"stages.{stage.name}.{stage.kind}.{key}")
        if isinstance(reference, ModelRef) and reference not in stage.recipe.stages and isinstance(path, Path):
            yield key, reference, path


def _check_model(files: ModelFiles, stage: Stage[Any], key: str, reference: ModelRef, classes: set[str]) -> list[str]:
    files.require_tokenizer()
    if isinstance(reference, TokenizerRef):
        _check_special_tokens(files.directory, objective_class(stage.config.objective))
        return []
    files.refuse_quantizer()
    if stage.kind == "export" and key == "model" and _quantized_here(files.directory):
        return []
    trained = TRAINED.get(stage.kind) == key
    if stage.kind == "pretrain":
        extended = stage.config.tokenizer is not None and stage.config.tokenizer.extend is not None
        if extended and files.vocabulary_kind not in (None, "WordPiece"):
            raise UserError(f"{files.directory}: {NOT_EXTENDED}")
        _check_weights(files, None)
        return _vocabulary_notes(files, trained)
    task = task_class(stage.config.task)
    own = class_names(files.config, task.head.removeprefix("AutoModel"))
    if own is None and not trained:
        architectures = ", ".join(files.config.get("architectures") or []) or "unknown"
        raise UserError(f"{files.directory}: not {task.says} (its architecture is {architectures}): fine-tune it first")
    notes = []
    if getattr(stage.config, "initialize", "pretrained") == "pretrained":
        _check_weights(files, own)
        called = [stage.config.task.class_name(name) for name in own or []]
        notes = _class_notes(files, called, classes, trained) if called else []
        other = other_head(files.config, task.head.removeprefix("AutoModel"))
        notes += [f"its head is that of a {other}: a new head"] if other else []
    return [*notes, *_vocabulary_notes(files, trained)]


def _quantized_here(directory: Path) -> bool:
    """True for the directory of a `quantize` stage of an earlier run: a graph, no weights."""
    record = read_stage(directory)
    return record is not None and record["kind"] == "quantize"


def _check_special_tokens(directory: Path, objective: type[Objective]) -> None:
    """Raises UserError when the files of a tokenizer show that it cannot make the rows of a pretraining."""
    if (directory / "config.json").is_file():
        return  # its type of model may know more
    path = directory / "tokenizer_config.json"
    named = read_json(path)
    if named is None:
        raise UserError(f"{path}: no such file: it says which tokens are {', '.join(objective.special_tokens)}")
    if not isinstance(named, dict):
        raise UserError(f"{path}: not the configuration of a tokenizer")
    known = {**(read_json(directory / "special_tokens_map.json") or {}), **named}
    missing = [name for name in objective.special_tokens if not known.get(name)]
    if missing and named.get("tokenizer_class") in GENERIC:
        raise UserError(f"{path}: names no {', '.join(missing)}, which {objective.says} needs: name them")


def _check_weights(files: ModelFiles, own: list[str] | None) -> None:
    files.tensors  # noqa: B018 - reads every header
    declared, rows = files.config.get("vocab_size"), files.embedding_rows
    if rows is not None and isinstance(declared, int) and declared != rows:
        raise UserError(
            f"{files.directory}: config.json says vocab_size={declared}, its weights have {rows} embeddings: not of one model"
        )
    if own is not None and files.head_rows is not None and files.head_rows != len(own):
        raise UserError(
            f"{files.directory}: config.json names {len(own)} classes, its weights score {files.head_rows}: not of one model"
        )


def _class_notes(files: ModelFiles, own: list[str], classes: set[str], trained: bool) -> list[str]:
    """Compares the classes of a model with the names in the first rows of the data."""
    if not classes or classes == set(own) or (classes < set(own) and not trained):
        return []
    gap = f"its classes are {listed(own)}, the data is labelled {listed(sorted(classes))}"
    if trained:
        rest = " unless later rows hold the rest" if classes < set(own) else ""
        unnamed = len(own) == len(classes) and not named(own)
        return [f"{gap}: a new head{rest}{f', unless {names_hint(own, sorted(classes))} names them' if unnamed else ''}"]
    fix = "map them by task.names, or fine-tune it on this data first" if named(own) else f"name them in {names_hint(own, [])}"
    raise UserError(f"{files.directory}: {gap}: {fix}")


def _vocabulary_notes(files: ModelFiles, trained: bool) -> list[str]:
    rows, tokens = files.config.get("vocab_size"), files.vocabulary
    if not isinstance(rows, int) or tokens is None or tokens <= rows:
        return []
    gap = f"its tokenizer has {tokens:,} tokens, its embedding {rows:,} rows"
    if not trained:
        raise UserError(f"{files.directory}: {gap}: fine-tune it first (rows are added), or use its own tokenizer")
    return [f"{gap}: rows are added"]
