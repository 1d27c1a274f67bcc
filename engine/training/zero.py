"""DeepSpeed JSON files: read and filled with what the recipe decides. Nothing here loads torch."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError, did_you_mean
from engine.training.config import WHOLE_TENSORS
from engine.training.zero_keys import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, TOP_LEVEL, ZERO_OPTIMIZATION

if TYPE_CHECKING:
    from engine.training.config import TrainConfig, Trained

NVME_VARIABLE = "BOTHWAYS_NVME_PATH"
"""Environment variable: the directory on a local disk that `"nvme_path": "auto"` stands for. It belongs to the machine, so the
recipe does not name it; unset, the working directory of the stage is taken."""


OBJECTS = ("bf16", "bfloat16", "fp16", "torch_autocast", "data_types", "data_efficiency")
"""Keys that are looked into."""
SIZES = ("_size", "_threshold", "_parameters", "_distance", "_count")
"""Endings of the keys that hold numbers."""


@dataclass(frozen=True)
class Host:
    """Where a stage runs, as far as a DeepSpeed JSON depends on it; None: not known yet, as in `bothways check`."""

    cuda: bool | None = None
    local_processes: int | None = None
    """Ranks on this node."""
    scratch: Path | None = None
    """Working directory of the stage."""

    @property
    def nvme(self) -> Path | None:
        """What `"nvme_path": "auto"` stands for."""
        if self.scratch is None:
            return None
        local = os.environ.get(NVME_VARIABLE)
        return (Path(local, *self.scratch.parts[-2:]) if local else self.scratch) / "nvme"


def zero_config_of(config: Trained, processes: int) -> str | None:
    """Returns the name or path of the DeepSpeed JSON that a stage trains under; None: without DeepSpeed.

    Stage 0 is plain data parallelism. A single process needs no engine, except for the loss scaling of fp16.
    """
    return config.parallel or ("zero0" if processes > 1 or config.train.precision == "fp16" else None)


def read_zero_config(path: Path, train: TrainConfig, micro: int, accumulation: int, host: Host | None = None) -> dict[str, Any]:
    """Reads a DeepSpeed JSON and fills in what the recipe decides; the recipe is the one source of these numbers.

    Args:
        path: the file.
        train: the recipe's `train`.
        micro: rows per forward pass of one rank.
        accumulation: forward passes per optimizer step.
        host: where the stage runs; what it does not know stays `"auto"` and is not judged.

    Raises:
        UserError: not a JSON object, an unknown key, a key that contradicts the recipe, a combination that DeepSpeed gets wrong,
            or one that this machine cannot run.
    """
    host = host or Host()
    config = _read(path)
    zero = config["zero_optimization"]
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
    _fill(zero, host)
    for problems in (_contradictions(config, train), _zero_problems(zero, train), _hardware_problems(zero, train, host)):
        for problem in problems:
            raise UserError(f"{path}: {problem}")
    if train.precision == "fp16":
        # Dynamic loss scaling: a step whose gradients overflow is left out and the scale is halved.
        config["fp16"] = {"loss_scale": 0, "initial_scale_power": 16, **(config.get("fp16") or {}), "enabled": True}
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or type(zero.get("stage")) is not int or zero["stage"] not in (0, 1, 2, 3):
        raise UserError(f"{path}: not a ZeRO configuration: zero_optimization.stage must be 0, 1, 2 or 3")
    sections = [("", config, TOP_LEVEL), ("zero_optimization.", zero, ZERO_OPTIMIZATION)]
    for key, known in (("offload_optimizer", OFFLOAD_OPTIMIZER), ("offload_param", OFFLOAD_PARAM)):
        section = zero.get(key) or {}
        if not isinstance(section, dict):
            raise UserError(f'{path}: zero_optimization.{key} must be an object, as in {{"device": "cpu"}}')
        if section.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(
                f"{path}: zero_optimization.{key}.device must be none, cpu or nvme, not {json.dumps(section['device'])}"
            )
        sections.append((f"zero_optimization.{key}.", section, known))
    for where, section, names in sections:
        for key, value in section.items():
            if key not in names:
                raise UserError(f"{path}: DeepSpeed has no key '{where}{key}'{did_you_mean(key, list(names))}")
            if key in OBJECTS and not isinstance(value or {}, dict):
                raise UserError(f'{path}: {key} must be an object, as in {{"enabled": true}}')
            if key.endswith(SIZES) and value != "auto" and type(value) not in (int, float):
                raise UserError(f"{path}: {where}{key} must be a number, not {json.dumps(value)}")
    return config


def _fill(zero: dict[str, Any], host: Host) -> None:
    for section in (zero.get("offload_optimizer"), zero.get("offload_param")):
        if section and section.get("nvme_path") == "auto" and host.nvme:
            section["nvme_path"] = str(host.nvme)
    if zero.get("zero_hpz_partition_size") == "auto" and host.local_processes:
        zero["zero_hpz_partition_size"] = host.local_processes


def _contradictions(config: dict[str, Any], train: TrainConfig) -> Iterator[str]:
    """Yields the keys outside `zero_optimization` that say otherwise than the recipe, or would do so silently."""
    for key in ("optimizer", "scheduler"):
        if key in config:
            yield f"'{key}' is set here, but the recipe decides it (train): remove it"
    for key in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        if _enabled(config.get(key)) and not _agrees(key, config[key], train):
            yield f"'{key}' is enabled here, but the recipe decides it (train.precision): remove it"
    if train.precision == "fp16" and (config.get("fp16") or {}).get("enabled") is False:
        yield "fp16.enabled=false contradicts train.precision=fp16: remove it"
    if (config.get("data_types") or {}).get("grad_accum_dtype", "fp32") != "fp32":
        yield "data_types.grad_accum_dtype: gradients are summed in fp32 (train.precision): remove it"
    if config.get("communication_data_type", "fp32") != "fp32":
        yield "communication_data_type: gradients are summed over ranks in fp32 (train.precision): remove it"
    if "activation_checkpointing" in config:
        # It configures a function that only models written for DeepSpeed call.
        yield "'activation_checkpointing' does nothing to these models: remove it and set train.gradient_checkpointing"
    if config.get("gradient_allreduce_op", "average") != "average":
        yield "gradient_allreduce_op must be average: the loss is divided by the targets of all ranks, once"
    if _enabled(config.get("data_efficiency")):
        yield "'data_efficiency' changes what is trained on, which the recipe decides: remove it"
    for key in ("tensor_parallel", "expert_parallel", "sequence_parallel_size", "pipeline"):
        if config.get(key):
            yield f"'{key}' splits the model, but train.batch_size is shared out over all ranks: remove it"
    for key in _automatic(config):
        yield f'{key} is "auto", which nothing fills in: write a value'


def _enabled(section: dict[str, Any] | None) -> bool:
    return bool((section or {}).get("enabled"))


def _agrees(key: str, section: dict[str, Any], train: TrainConfig) -> bool:
    """True when the section says what the recipe says: DeepSpeed's own autocast beside precision=bf16, for example."""
    if key == "torch_autocast":
        return train.precision == "bf16" and section.get("dtype") in ("bfloat16", "bf16")
    return key == "fp16" == train.precision


def _zero_problems(zero: dict[str, Any], train: TrainConfig) -> Iterator[str]:
    """Yields what DeepSpeed would get wrong, mostly without a word."""
    stage = zero["stage"]
    optimizer, parameters = offload_devices(zero)
    if stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        yield "zero_optimization.stage3_gather_16bit_weights_on_model_save must be true, else the saved weights are empty"
    if stage and train.optimizer in WHOLE_TENSORS:
        yield f"train.optimizer={train.optimizer} measures whole tensors, of which stage {stage} cuts pieces: use zero0, or adamw"
    if optimizer != "none" and train.optimizer == "adamw_8bit":
        yield "offload_optimizer replaces the optimizer by DeepSpeed's CPU Adam: use train.optimizer=adamw, or remove it"
    if optimizer == "nvme" and stage != 3:
        yield f"offload_optimizer to nvme falls back to the CPU silently at stage {stage}: use stage 3 or device cpu"
    if optimizer != "none" and stage == 0:
        yield "offload_optimizer does nothing at stage 0: use stage 1, 2 or 3"
    if parameters != "none" and stage != 3:
        yield f"offload_param does nothing at stage {stage}: use stage 3"
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key) or {}
        if section.get("device") == "nvme" and not section.get("nvme_path"):
            yield f'zero_optimization.{key} to nvme needs nvme_path: a directory on a local disk, or "auto"'
    if zero.get("compute_grad_norm") is False:
        yield "zero_optimization.compute_grad_norm=false: train.clip needs the norm: remove it"
    if zero.get("zero_quantized_gradients") and train.precision != "fp16":
        yield (
            "zero_optimization.zero_quantized_gradients: its kernels take fp16 gradients, and train.precision gives fp32 ones: "
            "remove it, or train in fp16"
        )
    if train.compile and stage == 3:
        yield "train.compile: stage 3 gathers the weights of a layer while it runs, which one kernel cannot: leave it out"
    if zero.get("zenflow"):
        yield "zero_optimization.zenflow turns the losses into NaN with this DeepSpeed: remove it"


def _hardware_problems(zero: dict[str, Any], train: TrainConfig, host: Host) -> Iterator[str]:
    if host.cuda is False:
        for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
            if zero.get(key):
                yield f"zero_optimization.{key} (ZeRO++) needs CUDA kernels and there is no GPU here: use zero3 or zero3_hpz"
        if train.precision == "fp16":
            yield "train.precision=fp16 needs a GPU and there is none here: use bf16 or fp32"
    groups = zero.get("zero_hpz_partition_size")
    if isinstance(groups, int) and groups > 1 and host.local_processes and host.local_processes % groups:
        yield (
            f"zero_optimization.zero_hpz_partition_size={groups} does not divide the {host.local_processes} processes here: "
            'say "auto"'
        )


def _automatic(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _automatic(item, f"{where}.{key}".lstrip("."))
    elif value == "auto" and where.rpartition(".")[2] not in ("nvme_path", "zero_hpz_partition_size"):
        yield where


def offload_devices(zero: dict[str, Any]) -> tuple[str, str]:
    """Returns where the optimizer state and the parameters of a `zero_optimization` section go: none, cpu or nvme."""
    optimizer, parameters = ((zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param"))
    return optimizer, parameters


def layout_of(zero: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides, beside stage and number of ranks, how DeepSpeed cuts the optimizer state into files."""
    optimizer, parameters = offload_devices(zero)
    return {
        "offload_optimizer": optimizer,
        "offload_param": parameters,
        "round_robin_gradients": bool(zero.get("round_robin_gradients")),
        "sub_group_size": zero.get("sub_group_size"),
    }


def prepare_nvme(config: dict[str, Any]) -> list[Path]:
    """Makes the directories that a configuration swaps to and tries them; DeepSpeed would crash in its first write.

    Returns:
        the directories.

    Raises:
        UserError: one cannot be written, or its file system has no direct I/O.
    """
    sections = (config["zero_optimization"].get(key) or {} for key in ("offload_optimizer", "offload_param"))
    directories = list(dict.fromkeys(Path(section["nvme_path"]) for section in sections if section.get("device") == "nvme"))
    for directory in directories:
        probe = directory / f"probe-{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
            try:
                # Direct I/O takes whole, aligned pages; an anonymous map is one.
                os.write(descriptor, mmap.mmap(-1, mmap.PAGESIZE))
            finally:
                os.close(descriptor)
                probe.unlink()
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be swapped to ({error.strerror}): set {NVME_VARIABLE} to a directory on a local disk"
            ) from None
    return directories
