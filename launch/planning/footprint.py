"""What one forward and backward pass of a stage's model keeps in memory, found without weights and without memory.

The model is built from its configuration on fake tensors (they have shapes, but no storage) and runs a micro batch; every storage
that it would allocate is counted from its birth to its death. That covers what formulas of activations leave out: autocast's
copies of weights, the vocabulary's logits, the temporaries of the backward pass, gradient checkpointing.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.models import checkpoint_activations

ROWS = (2, 4)
"""Numbers of rows that are run; one row alone would be broadcast."""
Build = Callable[[], Any]
Loss = Callable[[Any, int], torch.Tensor]
"""(model, rows) → scalar loss of a micro batch of that many rows."""


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment of a micro batch, parameters apart."""

    activations: int
    """Everything but gradients of parameters."""
    gradients: int


@dataclass(frozen=True)
class Footprint:
    """What a model needs for a micro batch of a given number of rows."""

    numels: tuple[int, ...]
    """Elements of every parameter, in order; tied ones once."""
    largest_module: int
    """Elements of the largest module's own parameters."""
    rows: int
    moments: tuple[Moment, ...]
    """The moments that no other one exceeds in both numbers, by falling activations."""

    @property
    def parameters(self) -> int:
        return sum(self.numels)


@dataclass(frozen=True)
class Measured:
    """The same pass with two numbers of rows: memory is linear in them, moment by moment."""

    numels: tuple[int, ...]
    largest_module: int
    rows: tuple[int, int]
    moments: tuple[list[Moment], list[Moment]]

    @property
    def parameters(self) -> int:
        return sum(self.numels)

    def at(self, rows: int) -> Footprint:
        """Returns the footprint of a micro batch of `rows` rows."""
        (few, many), (first, second) = self.rows, self.moments
        factor = (rows - few) / (many - few)
        moments = [
            Moment(round(a.activations + factor * (b.activations - a.activations)), b.gradients)
            for a, b in zip(first, second, strict=True)
        ]
        return Footprint(self.numels, self.largest_module, rows, frontier(moments))


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, for as long as they live."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters
        self.known = {id(parameter.untyped_storage()) for parameter in parameters}
        self.bytes = 0
        self.moments: list[Moment] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = operation(*arguments, **(keywords or {}))
        grew = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                grew |= self._count(tensor.untyped_storage())
        if grew:
            self.note()
        return result

    def _count(self, storage: torch.UntypedStorage) -> bool:
        if id(storage) in self.known:
            return False
        size = storage.nbytes()
        self.known.add(id(storage))
        self.bytes += size
        weakref.finalize(storage, self._free, id(storage), size)
        return True

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size

    def note(self) -> None:
        gradients = sum(
            4 * p.numel() if p.dtype == torch.float32 else 2 * p.numel() for p in self.parameters if p.grad is not None
        )
        self.moments.append(Moment(self.bytes - gradients, gradients))


def frontier(moments: list[Moment]) -> tuple[Moment, ...]:
    """Returns the moments that no other one exceeds in both numbers, by falling activations."""
    kept: list[Moment] = []
    for moment in sorted(set(moments), key=lambda moment: (-moment.activations, -moment.gradients)):
        if not kept or moment.gradients > kept[-1].gradients:
            kept.append(moment)
    return tuple(kept)


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output and one number a query, and never the scores (arXiv:2112.05682)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([] if mask is None else [mask.to(query.dtype)]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@contextlib.contextmanager
def gpu_kernels(enabled: bool) -> Iterator[None]:
    """While the body runs, attention and dropout take the memory that they take on a GPU: CPUs keep the scores of attention, and
    masks of dropout in the type of what they mask."""
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention, functional.dropout

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **keywords: Any) -> torch.Tensor:
        result: torch.Tensor = _FusedAttention.apply(query, key, value, attn_mask)
        return result

    def dropout(tensor: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        result: torch.Tensor = torch.native_dropout(tensor, p, training)[0] if training and p else tensor
        return result

    if enabled:
        functional.scaled_dot_product_attention, functional.dropout = attention, dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = before


def measure(build: Build, loss: Loss, precision: str, gradient_checkpointing: bool, gpu: bool = False) -> Measured:
    """Runs micro batches on fake tensors.

    Args:
        build: returns the model; it is called where tensors have no storage.
        loss: runs the model and returns a scalar.
        precision: `fp32`, `bf16` (autocast) or `fp16` (the whole model).
        gradient_checkpointing: as in the recipe.
        gpu: attention and dropout are those of a GPU.
    """
    with gpu_kernels(gpu), FakeTensorMode():
        model = build().train()
        if precision == "fp16":
            _halve(model)
        if gradient_checkpointing:
            checkpoint_activations(model)
        moments = tuple(_moments(model, loss, rows, precision) for rows in ROWS)
        own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
        return Measured(tuple(p.numel() for p in model.parameters()), max(own), ROWS, (moments[0], moments[1]))


def _halve(model: Any) -> None:
    """Makes every parameter fp16; `Module.half` cannot do that to fake tensors."""
    halves: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = halves.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().half()))


def _moments(model: Any, loss: Loss, rows: int, precision: str) -> list[Moment]:
    model.zero_grad()
    live = _Live(list(model.parameters()))
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(model, rows)
        value.backward()
        live.note()
    return live.moments
