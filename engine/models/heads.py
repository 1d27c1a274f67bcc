"""What a model has behind the head that transformers gives it: named in config.json, saved, loaded and trained with the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.models.crf import Transitions
from engine.models.weights import weight_files

HEAD_KEY = "bothways_head"
"""config.json key: the name of a part in PARTS, which is also that of the model's attribute."""
TAGS_KEY = "bothways_tags"
"""config.json key: so many of the head's classes, the first ones, are tags of words; all of them where it is absent."""
PARTS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "crf": lambda config: Transitions(getattr(config, TAGS_KEY, config.num_labels)),
}
"""What is added, made from the model's configuration."""


def add_part(model: Any) -> Any:
    """Adds the part that a model's configuration names, in place, with its first numbers; returns it, None where there is none.

    What it gives stands beside the head's output under its name, in one row for each row of the batch: it is computed inside of
    the model's forward pass, where a sharded parameter is whole.

    Raises:
        UserError: nothing of that name is known.
    """
    name = getattr(model.config, HEAD_KEY, None)
    if name is None:
        return None
    if name not in PARTS:
        raise UserError(f"config.json: {HEAD_KEY}={name}: known are {', '.join(PARTS)}: install the version that made the model")
    part = PARTS[name](model.config)
    model.add_module(name, part)

    def give(module: Any, inputs: Any, output: Any) -> Any:
        output[name] = module.get_submodule(name)().expand(output.logits.shape[0], -1, -1)
        return output

    model.register_forward_hook(give)
    return part


def load_part(model: Any, directory: Path | str, whole: bool) -> None:
    """Adds the part that a model's configuration names, in place, with its numbers from a model directory.

    Args:
        directory: or a hub id, whose weights have no such part.
        whole: they must be there; else what is not there, or of another shape, keeps its first numbers.

    Raises:
        UserError: they are not there.
    """
    part = add_part(model)
    if part is None:
        return
    prefix = f"{getattr(model.config, HEAD_KEY)}."
    found = _tensors(directory, prefix) if isinstance(directory, Path) else {}
    fits = all(key in found and found[key].shape == own.shape for key, own in part.state_dict().items())
    if fits:
        part.load_state_dict({key: found[key] for key in part.state_dict()})
    elif whole:
        raise UserError(f"model '{directory}': config.json names {prefix}* of another shape than its weights: not of one model")


def _tensors(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            found |= {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    return found


def fit_part(model: Any, order: torch.Tensor | None) -> None:
    """Follows a change of the head's classes, in place.

    Args:
        order: class i is what was class order[i]; None: the classes are others, and the part begins anew.
    """
    name = getattr(model.config, HEAD_KEY, None)
    if name is not None and order is not None:
        model.get_submodule(name).reorder(order)
    elif name is not None:
        setattr(model, name, PARTS[name](model.config))
