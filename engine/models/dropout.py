"""Dropout that costs little on CPUs, and the attention that uses it.

torch draws one Bernoulli number per element there, which takes as long as a part of a small model's matrix products. Here one
64-bit draw serves four elements: a place is dropped when its 16 bits fall below the probability, which is met to 2⁻¹⁷. The
generator is torch's global one, so that seeding and activation checkpointing work as with torch's own dropout.

Shapes: B rows, H heads, G heads of keys and values, Q queries, K keys, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from engine.models.families import family_of

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
    key_BGKD: torch.Tensor,
    value_BGKD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention as transformers calls it; returns (values of shape (B, Q, H, D), weights of shape (B, H, Q, K)).

    Heads of keys and values may be fewer than H: each serves H / G neighbouring heads of the queries (arXiv:2305.13245).
    """
    scale = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
    key_BHKD, value_BHKD = _for_every_head(key_BGKD, query_BHQD), _for_every_head(value_BGKD, query_BHQD)
    # In the order of transformers' own: without dropout the weights that a training ends with are the same bits.
    scores_BHQK = torch.matmul(query_BHQD, key_BHKD.transpose(2, 3)) * scale
    if position_bias is not None:
        scores_BHQK = scores_BHQK + position_bias
    if attention_mask is not None:
        scores_BHQK = scores_BHQK + attention_mask
    weights_BHQK = _dropout(functional.softmax(scores_BHQK, dim=-1), dropout, module.training)
    return torch.matmul(weights_BHQK, value_BHKD).transpose(1, 2).contiguous(), weights_BHQK


def _for_every_head(states_BGKD: torch.Tensor, query_BHQD: torch.Tensor) -> torch.Tensor:
    heads, groups = query_BHQD.shape[1], states_BGKD.shape[1]
    return states_BGKD if heads == groups else states_BGKD.repeat_interleave(heads // groups, dim=1)


def has_plain_attention(model: Any) -> bool:
    """True for a model of which the family table knows that its attention is `attention` without this dropout."""
    plain = family_of(model.config.model_type).plain_attention and getattr(model, "_supports_attention_backend", False)
    return plain and model.config._attn_implementation == "eager" and not getattr(model.config, "reorder_and_upcast_attn", False)


def cheapen(model: Any) -> None:
    """Gives a model that trains on a CPU this dropout, and this attention where it has none but the plain one; in place.

    Weights and their names stay, and so does what the model computes without dropout.
    """
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = Dropout
    if has_plain_attention(model):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        model.set_attn_implementation(ATTENTION)
