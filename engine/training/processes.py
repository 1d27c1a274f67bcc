"""Processes: the ranks of a stage under Accelerate and DeepSpeed, their device, their precision, and how they agree."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from engine.config import Recipe
from engine.cpu import cores, keep_freed_memory
from engine.data.batches import accumulation_steps
from engine.errors import UserError
from engine.gpu import require_usable
from engine.stages import heartbeat
from engine.training.config import Trained
from engine.training.zero import Host, layout_of, prepare_nvme, read_zero_config, zero_config_of

PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others: the main one may tokenize a large corpus alone. One that has died shows at once."""
BATCH_WORKERS = 3
"""Processes, at most, that make the batches of a rank with a GPU: one alone may take longer than a step of a small model."""


class Asked(Exception):  # noqa: N818 - nothing has gone wrong
    """The ranks were asked to stop, and have agreed on it."""


def require_processes(wanted: int | str, started: int, cuda: bool) -> None:
    """Raises UserError unless as many ranks were started as the recipe asks for, or fewer where there may be fewer GPUs."""
    if wanted in ("auto", started) or (cuda and isinstance(wanted, int) and started < wanted):
        return
    raise UserError(
        f"the recipe asks for processes={wanted}, but {started} were started: "
        f"use `bothways run`, or `accelerate launch --use_deepspeed --num_processes {wanted}`"
    )


class Processes:
    """The ranks of this stage: who they are and how they agree."""

    asked = False
    """This rank has got a SIGTERM or SIGUSR1."""

    def __init__(self, config: Trained, recipe: Recipe, scratch: Path | None = None) -> None:
        self.train = train = config.train
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        require_usable()
        require_processes(config.processes, self.processes, torch.cuda.is_available())
        name = zero_config_of(config, self.processes)
        self.parallel = recipe.find_zero(name) if name else None
        self.zero_stage = 0
        self.layout: dict[str, Any] = {}
        """Of the files that hold what ZeRO has split."""
        self.cuda = torch.cuda.is_available()
        if not self.cuda:
            keep_freed_memory()
        elif train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add up in another order
            torch.use_deterministic_algorithms(True)
        self.host = Host(self.cuda, int(os.environ.get("LOCAL_WORLD_SIZE", self.processes)), scratch)
        self.swapped_to: list[Path] = []
        self.micro, self.accumulation = accumulation_steps(train.batch_size, train.micro_batch_size, self.processes)
        self.accelerator = self._accelerator()
        if self.accelerator.num_processes != self.processes:
            raise RuntimeError(f"{self.processes} ranks were started but Accelerate sees {self.accelerator.num_processes}")
        self.rank = self.accelerator.process_index
        self.device = self.accelerator.device
        self.main = self.rank == 0

    def _accelerator(self) -> Any:
        # What `accelerate launch` or `accelerate config` left here would silently override the recipe.
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        _hush(self.cuda)
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        if self.parallel is None:
            return Accelerator(gradient_accumulation_steps=self.accumulation, cpu=not self.cuda, mixed_precision="no")
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        config = read_zero_config(self.parallel, self.train, self.micro, self.accumulation, self.host)
        self.swapped_to = prepare_nvme(config)
        self.zero_stage = config["zero_optimization"]["stage"]
        self.layout = layout_of(config["zero_optimization"]) if self.zero_stage else {}
        if self.zero_stage == 0 and self.train.precision != "fp16":
            config["gradient_clipping"] = 0.0  # the trainer clips replicated gradients itself, and learns their norm
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that an operator was built
            accelerator = Accelerator(
                gradient_accumulation_steps=self.accumulation,
                mixed_precision="no",
                deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False),
                # On CPUs the backend must be named: without it Accelerate sees one process where DeepSpeed sees several.
                kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if self.cuda else "gloo", timeout=PATIENCE)],
            )
        # Else transformers builds every later model in shards, with other initial weights and for all ranks only.
        unset_hf_deepspeed_config()
        return accelerator

    @property
    def describe(self) -> str:
        """Says how the work is spread and where each number comes from."""
        where = "NCCL" if self.cuda else "gloo"
        ranks = f"{self.processes} process{'es' if self.processes > 1 else ''}" + (f" over {where}" if self.processes > 1 else "")
        return (
            f"{ranks}, {self.parallel.stem if self.parallel else 'no ZeRO'}, accumulation = {self.accumulation} "
            f"(global {self.train.batch_size} / (micro {self.micro} × ranks {self.processes})), {self.precision}"
        )

    @property
    def precision(self) -> str:
        """`fp32`, `bf16` or `fp16`, after `auto` has been decided by the hardware."""
        if self.train.precision != "auto":
            return self.train.precision
        if self.cuda:
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        return "bf16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"

    @property
    def batch_workers(self) -> int:
        """Processes that make the batches of this rank: one core of those of each rank is left for itself; none on CPUs."""
        return min(BATCH_WORKERS, max(0, cores() // (self.host.local_processes or 1) - 1)) if self.cuda else 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In it, a GPU makes products in bf16 where training does: in fp32 they take longer than a step. A CPU's stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cuda and self.precision == "bf16")

    def device_memory(self) -> dict[str, int]:
        """Returns {"device_bytes": the most that tensors have taken of this rank's GPU}; nothing on a CPU."""
        return {"device_bytes": torch.cuda.max_memory_allocated(self.device)} if self.cuda else {}

    def poll(self) -> None:
        """Called before every batch of an evaluation: shows that this rank is alive.

        Raises:
            Asked: some rank was asked to stop; raised on all of them.
        """
        heartbeat.beat("evaluate")
        if self.sum(self.asked)[0]:
            raise Asked

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
        return list(values) if self.processes == 1 else self.summing(*values)().tolist()

    def summing(self, *values: float) -> Callable[[], torch.Tensor]:
        """Begins to sum each value over all ranks.

        Returns:
            a function that waits for the sums, of shape (values,), float64, and returns them: on this rank's device, or, where no
            other rank adds any, on the host. A GPU waits for them in its own stream: the host goes on.
        """
        total = torch.tensor(values, dtype=torch.float64)
        if self.processes == 1:
            return lambda: total
        total = total.pin_memory().to(self.device, non_blocking=True) if self.cuda else total
        work = torch.distributed.all_reduce(total, async_op=True)

        def sums() -> torch.Tensor:
            work.wait()
            return total

        return sums

    def close(self) -> None:
        """Leaves the process group; waits for the others first. What was swapped to a disk is removed."""
        if torch.distributed.is_initialized():
            self.barrier()
            torch.distributed.destroy_process_group()
        for directory in self.swapped_to:
            shutil.rmtree(directory / "zero_stage_3", ignore_errors=True)


def _hush(cuda: bool) -> None:
    """Silences what our dependencies say about themselves in every run, on every rank."""
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # Tied weights are saved once; the re-opened model is compared after the run.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
