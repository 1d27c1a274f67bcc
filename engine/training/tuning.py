"""One way or both ways: which weights of a model are trained, and how far below the head each lies."""

from __future__ import annotations

from typing import Any, Literal

import torch

from engine.errors import UserError
from engine.models.companions import companions


def stacks_of(model: Any) -> list[tuple[str, int]]:
    """Returns (name, layers) of every stack of layers of a transformer, in the order in which they are registered.

    A stack is a list of modules that lies in no other list, and is the longest one below its parent: an encoder-decoder has two.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    most: dict[str, str] = {}
    for name in outer:
        parent = name.rpartition(".")[0]
        if parent not in most or len(lists[name]) > len(lists[most[parent]]):
            most[parent] = name
    return [(name, len(lists[name])) for name in outer if most[name.rpartition(".")[0]] == name]


def depth_of(model: Any) -> dict[str, int]:
    """Returns {parameter: how many places below the head it lies}.

    The head and what comes behind the layers (a pooler, a last normalization) have 0, the topmost layer 1, and so on down;
    embedding tables and what comes before the layers lie below the lowest layer. The decoder of an encoder-decoder lies above its
    encoder. What learns beside the model is counted by itself.

    Raises:
        UserError: the model has no stack of layers.
    """
    beside = companions(model)
    stacks = [(name, layers) for name, layers in stacks_of(model) if name.partition(".")[0] not in beside]
    if not stacks:
        raise UserError(
            f"models of type '{model.config.model_type}' have no layers: leave train.layers, layer_decay and unfreeze out"
        )
    total = sum(layers for _, layers in stacks)
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    depths: dict[str, int] = {}
    behind = total + 1
    for name, _ in model.named_parameters():
        above = total
        for stack, layers in stacks:
            if name.startswith(f"{stack}."):
                index = int(name.removeprefix(f"{stack}.").partition(".")[0])
                # What is registered behind a stack lies where its top is; behind the last one that is the head.
                depths[name], behind = above - index, above - layers
                break
            above -= layers
        else:
            depths[name] = total + 1 if name.rpartition(".")[0] in tables else behind
    for name, companion in beside.items():
        depths |= {f"{name}.{parameter}": depth for parameter, depth in depth_of(companion).items()}
    return depths


def freeze_below(model: Any, layers: int | Literal["all"]) -> None:
    """Freezes everything more than `layers` places below the head, in place.

    Raises:
        UserError: the model has fewer layers.
    """
    if layers == "all":
        return
    depths = depth_of(model)
    if layers >= max(depths.values()):
        raise UserError(f"train.layers={layers}: the model has {max(depths.values()) - 1} layers: name fewer, or 'all' of it")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(depths[name] <= layers)
