"""What `bothways check` sees in the files of a model that a recipe names: weights, configuration, tokenizer, classes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from engine.config import ModelRef, TokenizerRef, references
from engine.errors import UserError
from engine.models.facts import SENTENCEPIECE, TOKENIZERS, ModelFiles, class_names, read_json
from engine.models.weights import refuse_pointer
from engine.objectives import Objective, objective_class
from engine.stage import Stage, read_stage
from engine.tasks import task_class

GENERIC = (None, "TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that know no special tokens but those that their files name."""
TRAINED = {"finetune": "model", "distill": "student.model"}
"""The key of each kind of stage whose model goes on learning: what its weights lack is made new."""


def check_models(stage: Stage[Any]) -> list[str]:
    """Looks into every model directory that a stage names; stages of the recipe are not there yet, hub ids not here.

    Returns:
        what will be done about a model that does not fit as it is, a line each.

    Raises:
        UserError: names the recipe's line, the file and the fix.
    """
    notes = []
    for key, reference in references(stage.config):
        where = f"stages.{stage.name}.{stage.kind}.{key}"
        path = stage.recipe.find(reference, where)
        if not isinstance(reference, ModelRef) or reference in stage.recipe.stages or not isinstance(path, Path):
            continue
        try:
            notes += [f"{key} '{reference}': {note}" for note in _check_model(ModelFiles(path), stage, key, reference)]
        except UserError as error:
            raise stage.recipe.error(where, str(error)) from None
    return notes


def _check_model(files: ModelFiles, stage: Stage[Any], key: str, reference: ModelRef) -> list[str]:
    _check_tokenizer(files.directory)
    if isinstance(reference, TokenizerRef):
        _check_special_tokens(files.directory, objective_class(stage.config.objective))
        return []
    files.refuse_quantizer()
    if stage.kind == "export" and key == "model" and _quantized_here(files.directory):
        return []
    architectures = files.config.get("architectures") or []
    trained = TRAINED.get(stage.kind) == key
    if stage.kind != "finetune":
        task = task_class(stage.config.task)
        if not any(task.head.removeprefix("AutoModel") in str(name) for name in architectures):
            known = ", ".join(map(str, architectures)) or "unknown"
            raise UserError(f"{files.directory}: not {task.says} (its architecture is {known}): fine-tune it first")
    if getattr(stage.config, "initialize", "pretrained") == "pretrained":
        _check_weights(files, trained)
    _check_vocabulary(files)
    return []


def _quantized_here(directory: Path) -> bool:
    """True for the directory of a `quantize` stage of an earlier run: a graph, no weights."""
    record = read_stage(directory)
    return record is not None and record["kind"] == "quantize"


def _check_tokenizer(directory: Path) -> None:
    for name in TOKENIZERS:
        refuse_pointer(directory / name)
        if (directory / name).is_file():
            return
    for name in SENTENCEPIECE:
        refuse_pointer(directory / name)
        if (directory / name).is_file():
            if importlib.util.find_spec("sentencepiece") is None:
                raise UserError(f"{directory / name}: no tokenizer.json, which is made from it: pip install sentencepiece")
            return
    raise UserError(f"{directory}: no tokenizer in it (tokenizer.json)")


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


def _check_weights(files: ModelFiles, trained: bool) -> None:
    files.tensors  # noqa: B018 - reads every header
    declared, rows = files.config.get("vocab_size"), files.embedding_rows
    if rows is not None and isinstance(declared, int) and declared != rows:
        raise UserError(
            f"{files.directory}: config.json says vocab_size={declared}, its weights have {rows} embeddings: not of one model"
        )
    classes = class_names(files.config)
    if classes is not None and files.head_rows is not None and files.head_rows != len(classes) and not trained:
        raise UserError(
            f"{files.directory}: config.json names {len(classes)} classes, its weights score {files.head_rows}: not of one model"
        )


def _check_vocabulary(files: ModelFiles) -> None:
    rows, tokens = files.config.get("vocab_size"), files.vocabulary
    if isinstance(rows, int) and tokens is not None and tokens > rows:
        raise UserError(
            f"{files.directory}: its tokenizer has {tokens:,} tokens, its embedding {rows:,} rows: use its own tokenizer"
        )
