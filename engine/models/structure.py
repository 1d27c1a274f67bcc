"""Physically smaller encoders: fewer attention heads and FFN neurons per layer than the configuration of the family can say.

The shape is kept in config.json under `bothways_structure` as {"heads": [kept per layer], "neurons": [kept per layer]}, so that a
pruned model is saved, loaded and exported like any other. Factorised matrices stand beside them, as {"ranks": [{role: rank} per
layer], "embedding_rank": rank}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.pytorch_utils import prune_linear_layer

from engine.errors import UserError
from engine.models.factors import ATTENTION, FFN, Factor, ThinEmbedding, factorize_embedding, factorized_linear, thin_linear
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
        of_layers = {key: [values[index] for index in keep] for key, values in structure.items() if isinstance(values, list)}
        setattr(model.config, STRUCTURE_KEY, {**structure, **of_layers})


def shrink(model: Any, heads: Sequence[Sequence[int]], neurons: Sequence[Sequence[int]]) -> None:
    """Keeps only the given heads and FFN neurons of every layer, in place, and says so in the configuration.

    Args:
        model: of a family with layers.
        heads: 0-based heads that stay, per layer, in the order they shall have.
        neurons: likewise.

    Raises:
        UserError: its matrices are factorised.
    """
    before = getattr(model.config, STRUCTURE_KEY, None) or {}
    if "ranks" in before:
        raise UserError("model: its matrices are factorised, and products are not pruned: prune first, factorise afterwards")
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
    setattr(model.config, STRUCTURE_KEY, {**before, **structure})


def factorize(model: Any, attention: int | float | None, ffn: int | float | None, embeddings: int | float | None) -> list[Factor]:
    """Factorises the matrices of a model in place, and says so in its configuration.

    Args:
        attention, ffn, embeddings: the rank of each kind of matrix, or the share of energy that it keeps; None: left alone.

    Returns:
        what became of each matrix.

    Raises:
        UserError: the family table does not say where the matrices lie, or the model is factorised already.
    """
    structure: dict[str, Any] = dict(getattr(model.config, STRUCTURE_KEY, None) or {})
    if "ranks" in structure or "embedding_rank" in structure:
        raise UserError("model: it is factorised already: take the stage before")
    found: list[Factor] = []
    ranks: list[dict[str, int]] = []
    wanted = {**dict.fromkeys(ATTENTION, attention), **dict.fromkeys(FFN, ffn)}
    for number, layer in enumerate(encoder_layers(model) if attention or ffn else []):
        ranks.append({})
        for role, share in wanted.items():
            if share is None:
                continue
            linear = layer.part(role)
            factor, thin = factorized_linear(f"layer {number}, {role}", linear, share)
            found.append(factor)
            if thin is not None and factor.rank is not None:
                layer.replace(role, thin)
                ranks[-1][role] = factor.rank
    if any(ranks):
        structure["ranks"] = ranks
    if embeddings is not None:
        factor = factorize_embedding(model, embeddings)
        found.append(factor)
        if factor.rank:
            structure["embedding_rank"] = factor.rank
    if structure:
        setattr(model.config, STRUCTURE_KEY, structure)
    return found


def apply_structure(model: Any, structure: dict[str, Any]) -> None:
    """Gives a freshly built model the shape that `bothways_structure` describes; its weights are loaded afterwards."""
    setattr(model.config, STRUCTURE_KEY, None)
    if "heads" in structure:
        shrink(model, [range(kept) for kept in structure["heads"]], [range(kept) for kept in structure["neurons"]])
    _apply_ranks(model, structure)
    setattr(model.config, STRUCTURE_KEY, structure)


def _apply_ranks(model: Any, structure: dict[str, Any]) -> None:
    if "ranks" in structure:
        for layer, ranks in zip(encoder_layers(model), structure["ranks"], strict=True):
            for role, rank in ranks.items():
                linear = layer.part(role)
                thin = thin_linear(linear.in_features, linear.out_features, rank, linear.bias is not None)
                layer.replace(role, thin)
    if "embedding_rank" in structure:
        table = model.get_input_embeddings()
        thin = ThinEmbedding(table.num_embeddings, table.embedding_dim, structure["embedding_rank"], table.padding_idx)
        model.set_input_embeddings(thin)
