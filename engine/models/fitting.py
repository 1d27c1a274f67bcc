"""What is changed in a stranger's model before it learns: its head by the names of the classes, its embedding and padding by the
tokenizer. Every change is said in a line.

Shapes: C classes, H features, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.models import load_model, read_config
from engine.models.facts import listed, named, names_hint, other_head
from engine.models.heads import fit_part
from engine.tasks import Task, own_classes

LABELS = ("num_labels", "id2label", "label2id")
"""Entries of a configuration that describe a head."""


def load_fitting(path: Path | str, task: Task, attention: str | None = None, random: bool = False) -> tuple[Any, list[str]]:
    """Loads a model that shall learn a task: what does not fit is made to.

    Draw with torch.manual_seed before: what is new is random.

    Args:
        path: directory or hub id.
        attention: see `load_model`.
        random: take only the shape and initialise every weight at random.

    Returns:
        (the model, what was changed in it: a line each).

    Raises:
        UserError: see `load_model`.
    """
    settings = task.settings()
    about = read_config(path)
    own = None if random else own_classes(task.config, about)
    labels = [name for _, name in sorted(settings.get("id2label", {}).items())]
    fits = own is None or not labels or own == labels
    model = load_model(path, task.head, attention, settings if fits else without(settings, LABELS), random)
    said = []
    if not fits:
        said = [fit_head(model, own or [], labels) or ""]
        for key, value in settings.items():
            setattr(model.config, key, value)
        same = own is not None and sorted(own) == sorted(labels)
        fit_part(model, torch.tensor([own.index(label) for label in labels]) if own and same else None)
    other = None if random else other_head(about.to_dict(), task.head.removeprefix("AutoModel"))
    if other:
        renew_head(model)
        said = [f"a new head: the one that it has is that of a {other}"]
    return model, [*said, *fit_tokenizer(model, task.tokenizer)]


def load_finished(path: Path | str, task: Task, attention: str | None = None) -> Any:
    """Loads a model that has learnt a task, as it is.

    Raises:
        UserError: see `load_model`; or its tokenizer has tokens without an embedding.
    """
    model = load_model(path, task.head, attention)
    rows, needed = embeddings(model, task.tokenizer)
    if needed > rows:
        raise UserError(f"{path}: its tokenizer has {needed:,} tokens, its embedding {rows:,} rows: use its own tokenizer")
    fit_padding(model, task.tokenizer)
    return model


def without(settings: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Returns the other entries."""
    return {key: value for key, value in settings.items() if key not in keys}


def output_layer(model: Any, classes: int) -> tuple[Any, str, torch.nn.Linear]:
    """Returns (the module that holds it, its name there, the layer) of the last linear layer: its rows are the classes.

    Raises:
        UserError: the head of this architecture ends otherwise.
    """
    body = f"{model.base_model_prefix}."
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.startswith(body) and layer.out_features == classes
    ]
    if not layers:
        raise UserError(
            f"models of type '{model.config.model_type}' have no linear layer of {classes} classes: use the model's body"
        )
    name, layer = layers[-1]
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute, layer


def fit_head(model: Any, own: Sequence[str], labels: Sequence[str]) -> str | None:
    """Makes row i of the head that of `labels[i]`, in place: moved by name, or drawn anew where the names are others.

    Args:
        own: names of the classes that the head has, in order.
        labels: names of the classes that it shall have.

    Returns:
        what was changed, in a line; None where nothing was.
    """
    if list(own) == list(labels):
        return None
    _, _, layer = output_layer(model, len(own))
    if sorted(own) == sorted(labels):
        order = torch.tensor([list(own).index(label) for label in labels])
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter[order])
        return f"the rows of its head are put in the order {listed(labels)}"
    renew_head(model, len(own), len(labels))
    for module in (model, model.base_model):
        if hasattr(module, "num_labels"):
            module.num_labels = len(labels)
    model.config.problem_type = None
    unnamed = len(own) == len(labels) and not named(own)
    hint = f" (to keep it, name its classes: {names_hint(own, labels)})" if unnamed else ""
    return f"a new head: its classes are {listed(own)}, those of the data {listed(labels)}{hint}"


def renew_head(model: Any, classes: int | None = None, wanted: int | None = None) -> None:
    """Draws the last linear layer of a head anew, in place.

    Args:
        classes: that it has; None: as many as the configuration says.
        wanted: that it shall have; None: as many.
    """
    holder, attribute, layer = output_layer(model, classes or model.config.num_labels)
    new = torch.nn.Linear(layer.in_features, wanted or layer.out_features, bias=layer.bias is not None)
    model._init_weights(new)
    setattr(holder, attribute, new)


def fit_tokenizer(model: Any, tokenizer: Any) -> list[str]:
    """Gives a model an embedding for every token id and the tokenizer's padding id, in place; returns what was changed."""
    rows, needed = embeddings(model, tokenizer)
    if needed <= rows:
        return fit_padding(model, tokenizer)
    if not isinstance(model.get_input_embeddings(), torch.nn.Embedding):
        raise UserError(f"its tokenizer has {needed - rows} tokens more than the model: factorise the table of tokens afterwards")
    model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        weight_VH = model.get_input_embeddings().weight
        weight_VH[rows:] = weight_VH[:rows].mean(dim=0)
    grown = f"{needed - rows} rows are added to its {rows:,} embeddings, as the mean of the others: its tokenizer has more tokens"
    return [grown, *fit_padding(model, tokenizer)]


def fit_new_words(model: Any, tokenizer: Any, before: Any) -> None:
    """Lets tokens that a vocabulary was extended by begin as the mean of what they were before, in place.

    Args:
        model: with a row for every token.
        tokenizer: knows the new tokens.
        before: the tokenizer that the model came with.
    """
    old, split = before.get_vocab(), before.backend_tokenizer.model.tokenize
    new = {number: [piece.id for piece in split(word)] for word, number in tokenizer.get_vocab().items() if word not in old}
    output = model.get_output_embeddings()
    with torch.no_grad():
        tables = [model.get_input_embeddings().weight, *([] if output is None else [output.weight, output.bias])]
        for table in tables:
            for number, pieces in new.items() if table is not None else ():
                table[number] = table[pieces].mean(dim=0)


def embeddings(model: Any, tokenizer: Any) -> tuple[int, int]:
    """Returns (token ids that have an embedding, token ids that the tokenizer may give)."""
    return model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values()) + 1


def fit_padding(model: Any, tokenizer: Any) -> list[str]:
    """Gives a model that knows no padding that of its tokenizer, in place: heads that read the last token find it by this id."""
    if getattr(model.config, "pad_token_id", None) is not None:
        return []
    model.config.pad_token_id = tokenizer.pad_token_id
    return [f"it knows no padding: '{tokenizer.pad_token}' pads, never attended"]
