"""Physically smaller encoders: fewer attention heads and FFN neurons per layer than the configuration of the family can say.

The shape is kept in config.json under `bothways_structure` as {"heads": [kept per layer], "neurons": [kept per layer]}, so that a
pruned model is saved, loaded and exported like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pytorch_utils import prune_linear_layer

from engine.models.families import STRUCTURE_KEY, Family, family_with_layers


class EncoderLayer:
    """One layer of an encoder: the linear maps that can shrink, by their role in the family table."""

    def __init__(self, module: torch.nn.Module, family: Family) -> None:
        self.module, self.family = module, family
        self.attention: Any = module.get_submodule(family.attention)

    def part(self, role: str) -> Any:
        """Returns the linear map of a role: query, key, value, output, up or down."""
        return self.module.get_submodule(getattr(self.family, role))

    def replace(self, role: str, linear: torch.nn.Module) -> None:
        """Puts another linear map in its place."""
        parent, _, name = getattr(self.family, role).rpartition(".")
        setattr(self.module.get_submodule(parent), name, linear)

    @property
    def heads(self) -> int:
        return self.attention.num_attention_heads

    @property
    def neurons(self) -> int:
        return self.part("up").out_features


def encoder_layers(model: Any) -> list[EncoderLayer]:
    """Returns the layers of an encoder that the family table knows.

    Raises:
        UserError: it does not.
    """
    family = family_with_layers(model)
    return [EncoderLayer(layer, family) for layer in model.base_model.get_submodule(family.layers)]


def keep_layers(model: Any, keep: list[int]) -> None:
    """Removes all other layers from `model`, in place, and says so in its configuration."""
    family = family_with_layers(model)
    assert family.layers is not None
    parent, _, name = family.layers.rpartition(".")
    layers = model.base_model.get_submodule(family.layers)
    setattr(model.base_model.get_submodule(parent), name, torch.nn.ModuleList([layers[index] for index in keep]))
    model.config.num_hidden_layers = len(keep)
    structure = getattr(model.config, STRUCTURE_KEY, None)
    if structure:
        setattr(model.config, STRUCTURE_KEY, {key: [values[index] for index in keep] for key, values in structure.items()})


def shrink(model: Any, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Keeps only the given heads and FFN neurons of every layer, in place, and says so in the configuration.

    Args:
        model: of a family with layers.
        heads: 0-based heads that stay, per layer, in the order they shall have.
        neurons: likewise.
    """
    for layer, kept_heads, kept_neurons in zip(encoder_layers(model), heads, neurons, strict=True):
        size = layer.attention.attention_head_size
        rows: Any = (torch.tensor(list(kept_heads))[:, None] * size + torch.arange(size)).flatten()
        for role in ("query", "key", "value"):
            layer.replace(role, prune_linear_layer(layer.part(role), rows))
        layer.replace("output", prune_linear_layer(layer.part("output"), rows, dim=1))
        layer.attention.num_attention_heads = len(kept_heads)
        layer.attention.all_head_size = len(rows)
        columns: Any = torch.tensor(list(kept_neurons))
        layer.replace("up", prune_linear_layer(layer.part("up"), columns))
        layer.replace("down", prune_linear_layer(layer.part("down"), columns, dim=1))
    structure = {"heads": [len(kept) for kept in heads], "neurons": [len(kept) for kept in neurons]}
    setattr(model.config, STRUCTURE_KEY, structure)


def apply_structure(model: Any, structure: dict[str, list[int]]) -> None:
    """Gives a freshly built model the shape that `bothways_structure` describes; its weights are loaded afterwards."""
    shrink(model, [range(kept) for kept in structure["heads"]], [range(kept) for kept in structure["neurons"]])
