"""The families of models: one row of facts per architecture of transformers. No other module names an architecture.

An architecture without a row trains, evaluates and exports; only what needs the row says in one line that it is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import UserError

NEW = "bert"
"""The family of models that are built from scratch, unless the recipe names another one."""

STRUCTURE_KEY = "bothways_structure"
"""config.json key of a physically smaller model: kept heads and FFN neurons per layer."""


@dataclass(frozen=True)
class Family:
    """Where the parts of an architecture lie, and what can be done with them. Paths are attributes, dotted."""

    layers: str | None = None
    """The list of layers, from the base model; None: unknown, so that layers can neither be left out nor shrunk."""
    attention: str = "attention.self"
    """In a layer: what holds the number of heads (`num_attention_heads`), their size and their sum."""
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    output: str = "attention.output.dense"
    """In a layer: the four linear maps of the attention; the inputs of `output` are the heads' outputs."""
    up: str = "intermediate.dense"
    down: str = "output.dense"
    """In a layer: the two linear maps of the feed-forward part; neurons lie between them."""
    positions_after_padding: bool = False
    """Positions are counted from behind the id of the padding token, so that so many embeddings of positions are never used."""
    packed: bool = False
    """Takes rows of several documents: explicit positions and an additive mask of shape (rows, 1, tokens, tokens)."""
    vocabulary_head: str | None = None
    """From the model: what scores the vocabulary for masked positions; takes hidden states."""
    dropout: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    """Keys of the configuration that hold a probability of dropout."""


UNKNOWN = Family()
_ENCODER = Family(layers="encoder.layer")
_OFFSET = replace(_ENCODER, positions_after_padding=True)
FAMILIES = {
    "bert": replace(_ENCODER, packed=True, vocabulary_head="cls"),
    "camembert": _OFFSET,
    "data2vec-text": _OFFSET,
    "electra": replace(_ENCODER, dropout=(*_ENCODER.dropout, "summary_last_dropout")),
    "ernie": _ENCODER,
    "layoutlm": _ENCODER,
    "megatron-bert": _ENCODER,
    "mpnet": Family(positions_after_padding=True),
    "rembert": replace(_ENCODER, dropout=(*_ENCODER.dropout, "classifier_dropout_prob")),
    "roberta": _OFFSET,
    "roberta-prelayernorm": _OFFSET,
    "roc_bert": _ENCODER,
    "xlm-roberta": _OFFSET,
    "xlm-roberta-xl": _OFFSET,
}
"""Rows by `model_type`."""
SHRUNK = "cannot be shrunk"


def family_of(model_type: str | None) -> Family:
    """Returns the row of an architecture; one that says nothing where there is none."""
    return FAMILIES.get(model_type or "", UNKNOWN)


def can_be_shrunk(model_type: str | None) -> bool:
    """Says whether layers, heads and neurons can be taken from models of this type."""
    return family_of(model_type).layers is not None


def family_with_layers(model: Any) -> Family:
    """Returns the row of a model of which it is known where its layers lie.

    Raises:
        UserError: there is none.
    """
    family = family_of(model.config.model_type)
    if family.layers is None:
        known = ", ".join(name for name, row in FAMILIES.items() if row.layers)
        raise UserError(f"models of type '{model.config.model_type}' {SHRUNK}: where their layers lie is known for {known}")
    return family


def family_for_packing(model_type: str) -> Family:
    """Returns the row of an architecture that takes packed rows.

    Raises:
        UserError: there is none.
    """
    family = family_of(model_type)
    if not family.packed:
        known = ", ".join(name for name, row in FAMILIES.items() if row.packed)
        raise UserError(f"models of type '{model_type}' take no packed rows: pretraining builds {known}")
    return family
