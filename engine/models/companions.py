"""A model that learns beside another one, as a generator beside its discriminator.

It is an attribute of the other, so that it trains, is sharded and resumes with it. It is saved in a directory of its own within
the other's, where plain transformers opens it; the other's weights lie alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NAMES = "_companions"


def attach(model: Any, name: str, companion: Any) -> None:
    """Lets a model learn beside another one, in place, under the name of an attribute and of a directory."""
    setattr(model, name, companion)
    setattr(model, _NAMES, (*companions(model), name))


def companions(model: Any) -> dict[str, Any]:
    """Returns what learns beside a model, by name."""
    return {name: getattr(model, name) for name in getattr(model, _NAMES, ())}


def together(model: Any) -> list[Any]:
    """Returns a model and what learns beside it."""
    return [model, *companions(model).values()]


def save_together(model: Any, tokenizer: Any, directory: Path, weights: dict[str, Any]) -> None:
    """Writes a model, and what learns beside it, as model directories, given the consolidated weights of all."""
    own = dict(weights)
    for name, companion in companions(model).items():
        prefix = f"{name}."
        beside = {key.removeprefix(prefix): own.pop(key) for key in weights if key.startswith(prefix)}
        save_together(companion, tokenizer, directory / name, beside)
    model.save_pretrained(directory, state_dict=own)
    tokenizer.save_pretrained(directory)
