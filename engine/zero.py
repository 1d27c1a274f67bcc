"""DeepSpeed JSON files: found, read and filled with what the recipe decides. Nothing here loads torch."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from engine.train_config import TrainConfig

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


def read_zero_config(path: Path, train: TrainConfig, micro: int, accumulation: int) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and fills in what the recipe decides; the recipe is the one source of these numbers.

    Args:
        path: the file.
        train: the recipe's `train`.
        micro: rows per forward pass of one rank.
        accumulation: forward passes per optimizer step.

    Raises:
        UserError: not a JSON object, a key that contradicts the recipe, or a combination that DeepSpeed gets wrong.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(f"{path}: not a ZeRO configuration: zero_optimization.stage must be 0, 1, 2 or 3")
    decided = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": train.batch_size,
        "gradient_clipping": train.clip,
    }
    for key, value in decided.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(f'{path}: {key}={given} contradicts the recipe, which gives {value}: set it to "auto"')
        config[key] = value
    problem = next(_problems(config, zero, train), None)
    if problem:
        raise UserError(f"{path}: {problem}")
    return config


def _problems(config: dict[str, Any], zero: dict[str, Any], train: TrainConfig) -> Iterator[str]:
    for key in ("optimizer", "scheduler"):
        if key in config:
            yield f"'{key}' is set here, but the recipe decides it (train): remove it"
    for key in ("bf16", "fp16", "amp", "torch_autocast"):
        section = config.get(key)
        if isinstance(section, dict) and section.get("enabled"):
            yield f"'{key}' is enabled here, but the recipe decides it (train.precision): remove it"
    for key in _automatic(config):
        yield f'{key} is "auto", which nothing fills in: write a value'
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        yield "zero_optimization.stage3_gather_16bit_weights_on_model_save must be true, else the saved weights are empty"
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device != "none" and train.optimizer == "adamw_8bit":
        yield "offload_optimizer replaces the optimizer by DeepSpeed's CPU Adam: use train.optimizer=adamw, or remove it"
    if device == "nvme" and zero["stage"] != 3:
        yield f"offload_optimizer to nvme falls back to the CPU silently at stage {zero['stage']}: use stage 3 or device cpu"


def _automatic(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _automatic(item, f"{where}.{key}".lstrip("."))
    elif value == "auto":
        yield where


def needed_operators(config: dict[str, Any], cuda: bool) -> list[str]:
    """Returns the DeepSpeed operators, by builder class, that a run compiles on first use."""
    zero = config["zero_optimization"]
    devices = {(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    offloads = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    builders = [] if cuda else ["ShareMemCommBuilder"]
    builders += ["CPUAdamBuilder"] if offloads else []
    return builders + (["AsyncIOBuilder"] if "nvme" in devices else [])
