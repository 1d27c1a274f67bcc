"""Dropout that costs little on CPUs, and the attention that uses it.

torch draws one Bernoulli number per element there, which takes as long as a part of a small model's matrix products. Here one
64-bit draw serves four elements: a place is dropped when its 16 bits fall below the probability, which is met to 2⁻¹⁷. The
generator is torch's global one, so that seeding and activation checkpointing work as with torch's own dropout.

Shapes: B rows, H heads, Q queries, K keys, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

ATTENTION = "bothways"
"""Name of the attention in transformers' registry."""
LEVELS = 1 << 16


class _Dropout(torch.autograd.Function):
    """Multiplies with 0, or with 1 / (share that is kept), forwards and backwards."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, dropped: int) -> torch.Tensor:
        count = values.numel()
        draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)  # all 64 bits
        kept = (draws.view(torch.int16)[:count].view(values.shape) >= dropped - LEVELS // 2).to(values.dtype)
        context.save_for_backward(kept)
        context.scale = LEVELS / (LEVELS - dropped)
        # The scale stays a number of its own: rounded to bf16 it would shift every element the same way.
        return (values * kept).mul_(context.scale)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (kept,) = context.saved_tensors
        return (gradient * kept).mul_(context.scale), None


def dropout(values: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    """Zeroes elements with `probability` (to the nearest 2⁻¹⁶) and scales the others so that the expectation stays."""
    dropped = round(probability * LEVELS)
    if not training or values.device.type != "cpu" or not 0 < dropped < LEVELS:
        return functional.dropout(values, probability, training)
    return _Dropout.apply(values, dropped)


_dropout = dropout  # transformers gives `attention` the probability by that name


class Dropout(torch.nn.Dropout):
    """`dropout` as a module."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the same shape."""
        return dropout(input, self.p, self.training)


def attention(
    module: Any,
    query_BHQD: torch.Tensor,
    key_BHKD: torch.Tensor,
    value_BHKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention as transformers calls it; returns (values of shape (B, Q, H, D), weights of shape (B, H, Q, K))."""
    scale = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    # In the order of transformers' own: without dropout the weights that a training ends with are the same bits.
    scores_BHQK = torch.matmul(query_BHQD, key_BHKD.transpose(2, 3)) * scale
    if attention_mask is not None:
        scores_BHQK = scores_BHQK + attention_mask
    weights_BHQK = _dropout(functional.softmax(scores_BHQK, dim=-1), dropout, module.training)
    return torch.matmul(weights_BHQK, value_BHKD).transpose(1, 2).contiguous(), weights_BHQK


def cheapen(model: Any) -> None:
    """Gives a model that trains on a CPU this dropout, and this attention where it has none but the plain one; in place.

    Weights and their names stay, and so does what the model computes without dropout.
    """
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = Dropout
    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "eager":
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)
