"""Processes, precision and ZeRO: the only file that knows Accelerate and DeepSpeed."""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.optim import build_optimizer
from engine.randomness import torch_seed
from engine.train_config import TrainConfig

Batch = dict[str, Any]
Loss = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]


def zero_config_names() -> list[str]:
    """Returns the names of the shipped ZeRO configurations."""
    return sorted(
        p.name.removesuffix(".json") for p in importlib.resources.files("ds_configs").iterdir() if p.name.endswith(".json")
    )


def read_zero_config(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON by the name of a file in ds_configs/ or by path.

    Raises:
        UserError: no such configuration, or not JSON.
    """
    shipped = importlib.resources.files("ds_configs") / f"{name}.json"
    path: Any = shipped if shipped.is_file() else Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, zero_config_names(), n=1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise UserError(f"parallel '{name}' is no file and none of {', '.join(zero_config_names())}{hint}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def fill_zero_config(name: str, config: dict[str, Any], decided: dict[str, Any]) -> dict[str, Any]:
    """Fills `auto` and absent keys with what the recipe decided; the recipe is the one source of these numbers.

    Raises:
        UserError: a key of the file contradicts the recipe, or sets what only the recipe may set.
    """
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(
                f"parallel '{name}': '{key}' is set there, but the recipe decides it (train): remove it from the file"
            )
    for key in ("bf16", "fp16", "torch_autocast"):
        if config.get(key, {}).get("enabled") is True:
            raise UserError(
                f"parallel '{name}': '{key}' is enabled there, but the recipe decides it (train.precision): remove it"
            )
    filled = dict(config)
    for key, value in decided.items():
        given = filled.get(key, "auto")
        if given != "auto" and given != value:
            raise UserError(f"parallel '{name}': {key}={given} contradicts the recipe, which gives {value}: set it to \"auto\"")
        filled[key] = value
    return filled


class Processes:
    """The ranks of this stage: who they are and how they agree."""

    def __init__(self, train: TrainConfig, parallel: str | None, expected: int | str) -> None:
        self.train = train
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        if isinstance(expected, int) and expected != self.processes:
            raise UserError(
                f"the recipe asks for processes={expected}, but {self.processes} were started: "
                f"use `bothways run`, or `accelerate launch --num_processes {expected}`"
            )
        # DeepSpeed stage 0 is plain data parallelism; one process needs no engine.
        self.parallel = parallel or ("zero0" if self.processes > 1 else None)
        self.cuda = torch.cuda.is_available()
        from engine.data.batches import accumulation_steps

        self.micro, self.accumulation = accumulation_steps(train.batch_size, train.micro_batch_size, self.processes)
        self.accelerator = self._accelerator()
        if self.accelerator.num_processes != self.processes:
            raise RuntimeError(f"{self.processes} ranks were started but Accelerate sees {self.accelerator.num_processes}")
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        self.main = self.rank == 0

    def _accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        if self.parallel is None:
            return Accelerator(gradient_accumulation_steps=self.accumulation, cpu=not self.cuda, mixed_precision="no")
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
        decided = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.train.batch_size,
            "gradient_clipping": self.train.clip,
        }
        config = fill_zero_config(self.parallel, read_zero_config(self.parallel), decided)
        # On CPUs the backend must be named: without it Accelerate sees one process where DeepSpeed sees several.
        handlers = [] if self.cuda else [InitProcessGroupKwargs(backend="gloo")]
        return Accelerator(
            gradient_accumulation_steps=self.accumulation,
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
            kwargs_handlers=handlers,
        )

    @property
    def describe(self) -> str:
        """Says how the work is spread and where each number comes from."""
        where = "NCCL" if self.cuda else "gloo"
        ranks = f"{self.processes} process{'es' if self.processes > 1 else ''}" + (f" over {where}" if self.processes > 1 else "")
        return (
            f"{ranks}, {self.parallel or 'no ZeRO'}, accumulation = {self.accumulation} "
            f"(global {self.train.batch_size} / (micro {self.micro} × ranks {self.processes})), {self.precision}"
        )

    @property
    def precision(self) -> str:
        """`fp32` or `bf16`, after `auto` has been decided by the hardware."""
        if self.train.precision != "auto":
            return self.train.precision
        if self.cuda:
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the body on the main rank, then on the others."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """Returns each value summed over all ranks, in float64."""
        if self.processes == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def close(self) -> None:
        """Leaves the process group; waits for the others first."""
        if torch.distributed.is_initialized():
            self.barrier()
            torch.distributed.destroy_process_group()


class _LossModule(torch.nn.Module):
    """Model and loss as one module, so that wrappers see a single forward and ZeRO gathers what it needs."""

    def __init__(self, model: torch.nn.Module, loss: Loss, bf16: bool, device_type: str) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._bf16 = bf16
        self._device_type = device_type

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            return self._loss(self.model, batch)


class Trainer:
    """One model in training: optimizer steps, consolidated weights, checkpoints of its shards."""

    def __init__(self, processes: Processes, model: torch.nn.Module, loss: Loss) -> None:
        self.processes = processes
        self.seed = 0
        accelerator = processes.accelerator
        module = _LossModule(model, loss, processes.precision == "bf16", processes.device.type)
        self.engine, self.optimizer = accelerator.prepare(module, build_optimizer(module, processes.train))
        self.model: Any = accelerator.unwrap_model(self.engine).model

    def step(self, micro_batches: list[Batch], step: int, learning_rate: float, count: float) -> tuple[float, float | None]:
        """One optimizer step.

        Args:
            micro_batches: this rank's share of the global batch.
            step: number of the step; with the seed it determines dropout.
            learning_rate: of this step.
            count: valid targets of the whole step, over all ranks and micro batches: the one divisor of the loss.

        Returns:
            (loss summed over this rank's targets, global gradient norm before clipping or None where the engine hides it).
        """
        processes, accelerator = self.processes, self.processes.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The wrappers average over ranks and accumulation steps; undo that, then divide once by the true count.
        scale = processes.processes * processes.accumulation / count
        total, norm = 0.0, None
        for index, batch in enumerate(micro_batches):
            torch.manual_seed(torch_seed(self.seed, "dropout", step, index * processes.processes + processes.rank))
            batch = {name: value.to(processes.device) for name, value in batch.items() if torch.is_tensor(value)}
            with accelerator.accumulate(self.engine):
                loss, _ = self.engine(batch)
                accelerator.backward(loss * scale)
                if accelerator.sync_gradients and processes.parallel is None:
                    norm = float(accelerator.clip_grad_norm_(self.engine.parameters(), processes.train.clip))
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(loss.detach())
        if processes.parallel is not None:
            known = self.engine.get_global_grad_norm()
            norm = None if known is None else float(known)
        return total, norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the consolidated weights on the main rank's CPU memory; every rank must call it."""
        state = self.processes.accelerator.get_state_dict(self.engine)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def save_shards(self, directory: Path) -> None:
        """Saves weights and optimizer state as this world's shards; every rank must call it."""
        self.processes.accelerator.save_state(str(directory))

    def load_shards(self, directory: Path) -> None:
        """Loads what `save_shards` saved at the same number of ranks."""
        self.processes.accelerator.load_state(str(directory))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
