"""Physically smaller models: fewer attention heads and FFN neurons per layer than the configuration of the family can say.

The shape is kept in config.json under `bothways_structure` as {"heads": [kept per layer], "neurons": [kept per layer]}, an
encoder's layers before those of its decoder, so that a pruned model is saved, loaded and exported like any other. Factorised
matrices stand beside them, as {"ranks": [{role: rank} per layer], "embedding_rank": rank}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import UserError
from engine.models.factors import (
    Factor,
    ThinEmbedding,
    factorize_embedding,
    factorized_linear,
    inputs_of,
    narrowed,
    outputs_of,
    thin_linear,
)
from engine.models.families import STRUCTURE_KEY, Matrix, Stack, check_kept, family_of, require, stack_sizes

Kept = Sequence[Sequence[int]]
"""What stays in each layer, 0-based, in the order that it shall have."""


class Layer:
    """One layer: the matrices that can shrink, by their role in the family table."""

    def __init__(self, module: torch.nn.Module, stack: Stack) -> None:
        self.module, self.stack = module, stack
        attention = {**stack.inputs, **({"output": Matrix(stack.output)} if stack.output else {})}
        self.matrices = {**attention, **stack.up, "down": Matrix(stack.down)}
        self.matrices = {role: matrix for role, matrix in self.matrices.items() if self._find(matrix.path) is not None}
        self.attention_roles = [role for role in attention if role in self.matrices]
        self.ffn_roles = [role for role in self.matrices if role not in attention]

    def _find(self, path: str) -> Any:
        found: Any = self.module
        for name in path.split("."):
            found = getattr(found, name, None)
        return found

    def part(self, role: str) -> Any:
        """Returns the matrix of a role: query, key, value, output, up, down, …"""
        return self._find(self.matrices[role].path)

    def replace(self, role: str, module: torch.nn.Module) -> None:
        """Puts another linear map in its place."""
        self._put(self.matrices[role].path, module)

    def _put(self, path: str, module: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._find(parent) if parent else self.module, name, module)

    @property
    def head_size(self) -> int:
        return getattr(self._find(self.stack.attention), self.stack.size)

    @property
    def heads(self) -> int:
        """Heads of the queries; 0 where they are in no matrix."""
        return inputs_of(self.part("output")) // self.head_size if self.stack.output else 0

    @property
    def group(self) -> int:
        """Heads of the queries that share a head of keys and values: they stay or leave together."""
        return self.heads * self.head_size // outputs_of(self.part("key")) if "key" in self.matrices else 1

    @property
    def neurons(self) -> int:
        return inputs_of(self.part("down"))

    def keep_heads(self, kept: Sequence[int]) -> None:
        """Keeps these heads of the queries, and the keys and values that they read."""
        heads, group, size = self.heads, self.group, self.head_size
        groups = list(dict.fromkeys(head // group for head in kept))
        if [head for index in groups for head in range(index * group, (index + 1) * group)] != list(kept):
            raise UserError(f"heads: {group} heads share their keys and values and stay or leave together")
        for matrix in (*self.stack.inputs.values(), *self.stack.beside):
            fewer = matrix in (self.stack.inputs.get("key"), self.stack.inputs.get("value"))
            self._narrow(matrix, heads // group if fewer else heads, groups if fewer else kept, size)
        self._narrow(self.matrices["output"], heads, kept, size, outputs=False)
        attention = self._find(self.stack.attention)
        for names, value in ((self.stack.counts, len(kept)), (self.stack.widths, len(kept) * size)):
            for name in names:
                setattr(attention, name, value)

    def keep_neurons(self, kept: Sequence[int]) -> None:
        """Keeps these neurons."""
        neurons = self.neurons
        for matrix in self.stack.up.values():
            self._narrow(matrix, neurons, kept)
        self._narrow(self.matrices["down"], neurons, kept, outputs=False)

    def _narrow(self, matrix: Matrix, there: int, kept: Sequence[int], size: int = 1, outputs: bool = True) -> None:
        part = self._find(matrix.path)
        if part is not None:
            places = torch.arange(matrix.parts * there * matrix.together * size).view(matrix.parts, there, -1)
            self._put(matrix.path, narrowed(part, places[:, list(kept)].flatten(), outputs))


def lists_of_layers(model: Any, stack: Stack) -> list[Any]:
    """Returns the lists of modules that hold the layers of a stack: one, but for families that share them."""
    before, star, after = stack.layers.partition(".*.")
    found = model.base_model.get_submodule(before)
    return [group.get_submodule(after) for group in found] if star else [found]


def stacks_of(model: Any) -> list[list[Layer]]:
    """Returns the layers of every stack of a model that the family table knows, an encoder's before a decoder's.

    Raises:
        UserError: it does not.
    """
    family = require(model.config.model_type, "layers")
    return [[Layer(each, stack) for found in lists_of_layers(model, stack) for each in found] for stack in family.stacks]


def layers_of(model: Any) -> list[Layer]:
    """Returns all layers of a model; see `stacks_of`."""
    return [layer for stack in stacks_of(model) for layer in stack]


def sizes_of(model: Any) -> list[int]:
    """Returns how many layers each stack of a model has; see `stack_sizes`.

    Raises:
        UserError: the family table does not know.
    """
    require(model.config.model_type, "layers")
    return stack_sizes(model.config.to_dict())


def keep_layers(model: Any, *keep: list[int]) -> None:
    """Removes all other layers from `model`, in place, and says so in its configuration.

    Args:
        keep: 0-based layers of each stack.

    Raises:
        UserError: the family table does not know where they lie, or layer 0 has to stay.
    """
    sizes, family = sizes_of(model), family_of(model.config.model_type)
    for kept in keep:
        check_kept(model.config.model_type, kept)
    if family.shared_layers:
        setattr(model.config, family.stacks[0].count, len(keep[0]))
        return
    for stack, kept in zip(family.stacks, keep, strict=True):
        parent, _, name = stack.layers.rpartition(".")
        layers = model.base_model.get_submodule(stack.layers)
        setattr(model.base_model.get_submodule(parent), name, torch.nn.ModuleList([layers[index] for index in kept]))
        setattr(model.config, stack.count, len(kept))
        for index, layer in enumerate(model.base_model.get_submodule(stack.layers)):
            _renumber(layer, index)
    for key in family.per_layer:
        listed = getattr(model.config, key, None)
        if listed:
            setattr(model.config, key, [listed[index] for index in keep[0]])
    structure = getattr(model.config, STRUCTURE_KEY, None)
    if structure:
        places = [sum(sizes[:number]) + index for number, kept in enumerate(keep) for index in kept]
        of_layers = {key: [values[place] for place in places] for key, values in structure.items() if isinstance(values, list)}
        setattr(model.config, STRUCTURE_KEY, {**structure, **of_layers})


def _renumber(layer: Any, index: int) -> None:
    """Tells the modules of a layer its new number: caches of keys and values are found by it."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = index


def shrink(model: Any, heads: Kept | None, neurons: Kept | None) -> None:
    """Keeps only the given heads and FFN neurons of every layer, in place, and says so in the configuration.

    Args:
        model: of a family with layers.
        heads: 0-based heads that stay, per layer, in the order they shall have; None: all.
        neurons: likewise.

    Raises:
        UserError: its matrices are factorised, or its family cannot lose them.
    """
    before = getattr(model.config, STRUCTURE_KEY, None) or {}
    if "ranks" in before:
        raise UserError("model: its matrices are factorised, and products are not pruned: prune first, factorise afterwards")
    structure = dict(before)
    layers = layers_of(model)
    if heads is not None:
        require(model.config.model_type, "heads")
        _narrow_biases(model, heads)
        for layer, kept in zip(layers, heads, strict=True):
            layer.keep_heads(kept)
        structure["heads"] = [len(kept) for kept in heads]
    if neurons is not None:
        require(model.config.model_type, "neurons")
        for layer, kept in zip(layers, neurons, strict=True):
            layer.keep_neurons(kept)
        structure["neurons"] = [len(kept) for kept in neurons]
    setattr(model.config, STRUCTURE_KEY, structure)


def _narrow_biases(model: Any, heads: Kept) -> None:
    """Narrows what all layers of a stack add to the scores of their heads: head i of every layer reads column i."""
    start = 0
    for stack, layers in zip(require(model.config.model_type, "heads").stacks, stacks_of(model), strict=True):
        kept = heads[start : start + len(layers)]
        start += len(layers)
        if not stack.bias:
            continue
        if any(list(each) != list(kept[0]) for each in kept):
            raise UserError("heads: all layers share a table of positions, a number for each head: keep the same heads in each")
        parent, _, name = stack.bias.rpartition(".")
        holder = model.base_model.get_submodule(parent)
        setattr(holder, name, narrowed(getattr(holder, name), torch.tensor(list(kept[0])), outputs=True))


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
    for operation, wanted in (("attention", attention), ("ffn", ffn), ("embeddings", embeddings)):
        if wanted is not None:
            require(model.config.model_type, operation)
    found: list[Factor] = []
    ranks: list[dict[str, int]] = []
    for number, layer in enumerate(layers_of(model) if attention or ffn else []):
        ranks.append({})
        shares = {**dict.fromkeys(layer.attention_roles, attention), **dict.fromkeys(layer.ffn_roles, ffn)}
        for role, share in shares.items():
            if share is None:
                continue
            factor, thin = factorized_linear(f"layer {number}, {role}", layer.part(role), share)
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
    heads, neurons = ([range(kept) for kept in structure[key]] if key in structure else None for key in ("heads", "neurons"))
    if heads or neurons:
        shrink(model, heads, neurons)
    _apply_ranks(model, structure)
    setattr(model.config, STRUCTURE_KEY, structure)


def _apply_ranks(model: Any, structure: dict[str, Any]) -> None:
    if "ranks" in structure:
        for layer, ranks in zip(layers_of(model), structure["ranks"], strict=True):
            for role, rank in ranks.items():
                part = layer.part(role)
                thin = thin_linear(inputs_of(part), outputs_of(part), rank, part.bias is not None)
                layer.replace(role, thin)
    if "embedding_rank" in structure:
        table = model.get_input_embeddings()
        thin = ThinEmbedding(table.num_embeddings, table.embedding_dim, structure["embedding_rank"], table.padding_idx)
        model.set_input_embeddings(thin)
