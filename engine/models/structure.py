"""Physically smaller encoders: fewer attention heads and FFN neurons per layer than the configuration of the family can say.

The shape is kept in config.json under `bothways_structure` as {"heads": [kept per layer], "neurons": [kept per layer]}, so that a
pruned model is saved, loaded and exported like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import prune_linear_layer

from engine.errors import UserError
from engine.models import STRUCTURE_KEY


class EncoderLayer(NamedTuple):
    """The parts of one encoder layer that can shrink."""

    attention: Any
    """Holds query, key, value, and the number and size of the heads."""
    attention_output: Any
    """Holds `dense`, whose inputs are the heads' outputs."""
    up: Any
    """Holds `dense`, whose outputs are the FFN neurons."""
    down: Any
    """Holds `dense`, whose inputs are the FFN neurons."""

    @property
    def heads(self) -> int:
        return self.attention.num_attention_heads

    @property
    def neurons(self) -> int:
        return self.up.dense.out_features


def encoder_layers(model: Any) -> list[EncoderLayer]:
    """Returns the layers of a BERT-like encoder (BERT, RoBERTa, ELECTRA, …).

    Raises:
        UserError: the model is built otherwise.
    """
    try:
        return [
            EncoderLayer(layer.attention.self, layer.attention.output, layer.intermediate, layer.output)
            for layer in model.base_model.encoder.layer
        ]
    except AttributeError:
        raise UserError(f"models of type '{model.config.model_type}' cannot be shrunk: only BERT-like encoders can") from None


def shrink(model: Any, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Keeps only the given heads and FFN neurons of every layer, in place, and says so in the configuration.

    Args:
        model: a BERT-like model.
        heads: 0-based heads that stay, per layer, in the order they shall have.
        neurons: likewise.
    """
    for layer, kept_heads, kept_neurons in zip(encoder_layers(model), heads, neurons, strict=True):
        size = layer.attention.attention_head_size
        rows: Any = (torch.tensor(list(kept_heads))[:, None] * size + torch.arange(size)).flatten()
        for name in ("query", "key", "value"):
            setattr(layer.attention, name, prune_linear_layer(getattr(layer.attention, name), rows))
        layer.attention_output.dense = prune_linear_layer(layer.attention_output.dense, rows, dim=1)
        layer.attention.num_attention_heads = len(kept_heads)
        layer.attention.all_head_size = len(rows)
        columns: Any = torch.tensor(list(kept_neurons))
        layer.up.dense = prune_linear_layer(layer.up.dense, columns)
        layer.down.dense = prune_linear_layer(layer.down.dense, columns, dim=1)
    structure = {"heads": [len(kept) for kept in heads], "neurons": [len(kept) for kept in neurons]}
    setattr(model.config, STRUCTURE_KEY, structure)


def apply_structure(model: Any, structure: dict[str, list[int]]) -> None:
    """Gives a freshly built model the shape that `bothways_structure` describes; its weights are loaded afterwards."""
    shrink(model, [range(kept) for kept in structure["heads"]], [range(kept) for kept in structure["neurons"]])
