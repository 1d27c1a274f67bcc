"""Trainer: optimizer steps of one model over the ranks of a stage, its consolidated weights, snapshots of its shards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree

from engine.data.batches import Batch
from engine.models import checkpoint_activations, compile_layers
from engine.models.dropout import cheapen
from engine.randomness import torch_seed
from engine.stages import heartbeat
from engine.training.optim import build_optimizer
from engine.training.processes import Processes
from engine.training.tuning import freeze_below

Loss = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]
REPLICATED, SHARDS = "replicated.pt", "shards"
"""File of a state that every rank holds; directory of DeepSpeed's files of one that is spread."""


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
    """One model in training: optimizer steps, consolidated weights, snapshots of its shards."""

    def __init__(self, processes: Processes, model: torch.nn.Module, loss: Loss) -> None:
        self.processes = processes
        self.seed = 0
        accelerator = processes.accelerator
        if processes.train.gradient_checkpointing:
            checkpoint_activations(model)
        if processes.device.type == "cpu":
            cheapen(model)
        elif processes.train.compile:
            compile_layers(model)
        model.train()  # transformers loads models for inference: without dropout, without gradient checkpointing
        module = _LossModule(model, loss, processes.precision == "bf16", processes.device.type)
        freeze_below(model, processes.train.layers)
        optimizer, self.depths = build_optimizer(model, processes.train)
        self.engine, self.optimizer = accelerator.prepare(module, optimizer)
        self.model: Any = accelerator.unwrap_model(self.engine).model
        self.sharded = processes.zero_stage > 0
        """The state of the optimizer is spread over the ranks; otherwise every rank holds all of it."""
        self.guarded = self.sharded or processes.precision == "fp16"
        """DeepSpeed clips, and drops a step whose gradient is not finite; otherwise that is done here."""

    def step(
        self,
        micro_batches: list[Batch],
        step: int,
        learning_rate: Callable[[int], float],
        count: Callable[[], torch.Tensor],
        largest_loss: float = math.inf,
    ) -> tuple[float, float]:
        """One optimizer step, which is left out when its loss or gradient is not finite, or its loss too large.

        Args:
            micro_batches: this rank's share of the global batch.
            step: number of the step; with the seed it determines dropout.
            learning_rate: gives that of this step for weights so many places below the head.
            count: returns the valid targets of the whole step, over all ranks and micro batches, of shape (): the one divisor of
                the loss, and not 0. Called after a forward pass, beside which the ranks sum it up.
            largest_loss: largest mean loss over all ranks whose gradient the weights may follow. A finite one makes the ranks
                wait for each other between forward and backward pass.

        Returns:
            (summed loss of this rank's targets, global gradient norm before clipping); a norm that is not finite says that
            nothing was changed, because of a loss or gradient that is not finite or a loss that is too large.
        """
        processes = self.processes
        for group, depth in zip(self.optimizer.param_groups, self.depths, strict=True):
            group["lr"] = learning_rate(depth)
        # DeepSpeed averages over ranks and accumulation steps; undo that, then divide once by the true count.
        averaged = processes.processes * processes.accumulation if processes.parallel else 1
        total = torch.zeros((), device=processes.device)
        last = len(micro_batches) - 1
        for index, batch in enumerate(micro_batches):
            heartbeat.beat("forward", step)
            self._seed(torch_seed(self.seed, "dropout", step, index * processes.processes + processes.rank))
            batch = {
                name: value.to(processes.device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)
            }
            loss, _ = self.engine(batch)
            total += loss.detach()
            heartbeat.beat("update", step)
            # A gradient that is not finite on one rank makes every rank leave the step out.
            follow = torch.isfinite(total)
            if index == last and math.isfinite(largest_loss):
                follow = follow & (processes.sum(float(total))[0] / count() <= largest_loss)
            scale = (averaged / count()).to(loss.dtype)
            self._backward(loss * torch.where(follow, scale, math.nan), last=index == last)
        return self._guarded_update(total) if self.guarded else self._own_update(total)

    def _seed(self, number: int) -> None:
        # torch.manual_seed would note the whole call stack in every step, for a GPU that may be initialised later.
        torch.default_generator.manual_seed(number)
        if self.processes.cuda:
            torch.cuda.manual_seed(number)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.processes.parallel is None:
            loss.backward()
            return
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def _guarded_update(self, loss: torch.Tensor) -> tuple[float, float]:
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        # -1 is DeepSpeed's word for a norm that is not finite.
        return float(loss), float(norm) if norm is not None and norm >= 0 else math.nan

    def _own_update(self, loss: torch.Tensor) -> tuple[float, float]:
        parameters = [parameter for parameter in self.engine.parameters() if parameter.grad is not None]
        total, clip = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]), self.processes.train.clip
        summed, norm = torch.stack((loss, total)).tolist()  # the one time that the host waits for a GPU
        if not norm < clip - 1e-6:  # else torch multiplies every gradient by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        # Parameters without a gradient stay as they are.
        if self.processes.parallel is not None:
            self.engine.step()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return summed, norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns a copy of the consolidated weights in the main rank's CPU memory; every rank must call it."""
        # ZeRO-3 gives None to all ranks but the main one.
        state = self.processes.accelerator.get_state_dict(self.engine) or {}
        if not self.sharded:
            state = copied(state)
        weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        # ZeRO hands out a copy for every name of a tied weight: tie them again, so that they are saved once.
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            source = first.setdefault(id(parameter), name)
            if name in weights:
                weights[name] = weights[source]
        return weights

    def snapshot(self, directory: Path) -> dict[Path, Any]:
        """Copies weights and optimizer state to CPU memory; every rank must call it.

        Args:
            directory: where the files will lie; it exists. ZeRO's offloaded tensors are copied there at once, from disk to disk.

        Returns:
            {file: what `torch.save` has to write into it} of this rank.
        """
        if not self.sharded:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            return {directory / REPLICATED: copied(state)} if self.processes.main else {}
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        files: dict[Path, Any] = {}

        class Memory(TorchCheckpointEngine):
            def save(self, state_dict: Any, path: str) -> None:
                files[Path(path)] = copied(state_dict)

            def preserves_storage_sharing(self) -> bool:
                return False  # else DeepSpeed copies everything once more

        before, self.engine.checkpoint_engine = self.engine.checkpoint_engine, Memory()
        try:
            self.engine.save_checkpoint(str(directory), tag=SHARDS, save_latest=False)
        finally:
            self.engine.checkpoint_engine = before
        return files

    def restore(self, directory: Path, universal: bool = False) -> None:
        """Loads what a snapshot wrote, at the same number of ranks or, converted, at any; every rank must call it.

        Args:
            directory: of the snapshot, or of its universal form.
            universal: it is a universal checkpoint (arXiv:2406.18820) of DeepSpeed's `ds_to_universal`.
        """
        if not self.sharded:
            state = torch.load(directory / REPLICATED, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        self.engine._config.load_universal_checkpoint = universal
        try:
            loaded, _ = self.engine.load_checkpoint(str(directory), tag=SHARDS)
        finally:
            self.engine._config.load_universal_checkpoint = False
        if universal:
            # DeepSpeed gives every group the settings (weight decay) of the first one, and all of them one counter of steps.
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(own)
            # torch counts in tensors, DeepSpeed's CPU Adam in numbers: the files have those of the optimizer that wrote them.
            inner = self.engine.optimizer.optimizer
            for state in inner.state.values():
                if "step" in state:
                    step = torch.as_tensor(state["step"], dtype=torch.float32).clone()
                    state["step"] = step if isinstance(inner, torch.optim.AdamW) else int(step)
        if loaded is None:
            raise RuntimeError(f"{directory}: DeepSpeed found no checkpoint in it")


def copied(value: Any) -> Any:
    """Returns a copy in CPU memory of nested containers of tensors; it shares nothing with what training changes."""

    def leaf(item: Any) -> Any:
        return item.detach().to("cpu", copy=True) if torch.is_tensor(item) else copy.copy(item)

    return torch.utils._pytree.tree_map(leaf, value)
