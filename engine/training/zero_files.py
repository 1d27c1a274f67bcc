"""Where DeepSpeed JSON files lie: those that are shipped, and those of the user."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from engine.errors import UserError, did_you_mean

SHIPPED = Path(str(importlib.resources.files("ds_configs")))


def zero_config_names() -> list[str]:
    """Returns the names of the shipped ZeRO configurations."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def find_zero_config(name: str, base: Path) -> Path:
    """Returns the DeepSpeed JSON of a name in ds_configs/ or of a path, which starts at `base` unless it is absolute.

    Raises:
        UserError: there is none.
    """
    for path in (SHIPPED / f"{name}.json", base / Path(name).expanduser()):
        if path.is_file():
            return path
    raise UserError(f"parallel '{name}' is no file and no shipped ZeRO configuration{did_you_mean(name, zero_config_names())}")
