"""Attention within the documents of packed rows by their lengths, without a mask: on GPUs, in half precision.

A mask of rows × tokens × tokens has to be read by every layer, and keeps fused attention from leaving out what no token sees.
FlashAttention (arXiv:2307.08691) takes the places where documents begin instead.

Shapes: B rows, L tokens a row, T = B × L tokens, H heads, G heads of keys and values, D features of a head, N documents.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.models.families import family_of

ATTENTION = "bothways_varlen"
"""Name of the attention in transformers' registry."""
SHORTEST = 256
"""Tokens of a row from which it is taken: a step of shorter rows was not faster without a mask."""
WIDEST, MULTIPLE = 256, 8
"""A head has no more features than that, and a multiple of that many."""


def flash(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    dropout: float,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Returns the values that every token gets from its own document, shape (T, H, D), bf16 or fp16.

    torch's public function for this (torch.nn.attention.varlen) has no dropout; this is the operator below it.

    Args:
        ends: 0, then where each document ends, shape (N + 1,), int32.
        longest: no document has more tokens.
        dropout: probability with which a weight of attention is dropped.
        causal: a token sees itself and what lies before it.
        window: a token sees tokens up to so far away, None: all.
    """
    sides = {} if window is None else {"window_size_left": window, "window_size_right": 0 if causal else window}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query_THD, key_TGD, value_TGD, ends, ends, longest, longest, dropout, causal, False, scale=scale, **sides
    )[0]
    return out


def attention(
    module: Any,
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: by lengths where they are given, else by the mask; returns values (B, L, H, D)."""
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        masked: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return masked
    rows, heads, length, width = query_BHLD.shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query_BHLD, key_BGLD, value_BGLD))
    causal = bool(getattr(module, "is_causal", False))
    # transformers counts the token itself, too.
    window = None if sliding_window is None else sliding_window - 1
    dropped = dropout if module.training else 0.0
    values_THD = flash(query, key, value, cu_seq_lens_q, max_length_q, dropped, causal, scaling, window)
    return values_THD.view(rows, length, heads, width), None


def attend_by_lengths(model: Any) -> None:
    """Lets a model that takes packed rows use it, in place, where its attention is transformers' fused one.

    Where no lengths are given, the model computes what it did.
    """
    family, config = family_of(model.config.model_type), model.config
    width = getattr(config, "head_dim", None) or getattr(config, family.hidden) // config.num_attention_heads
    if (
        not family.packed
        or config.is_encoder_decoder
        or config._attn_implementation != "sdpa"
        or not getattr(model, "_supports_attention_backend", False)
        or width > WIDEST
        or width % MULTIPLE
    ):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def takes_lengths(model: Any, length: int) -> bool:
    """Whether packed rows of so many tokens go through a model by their lengths."""
    half = torch.is_autocast_enabled(model.device.type) or model.dtype in (torch.bfloat16, torch.float16)
    return half and length >= SHORTEST and model.config._attn_implementation == ATTENTION
