"""Attention masks for packed rows."""

from __future__ import annotations

import torch


def packed_mask(segments_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Block-diagonal additive mask: a token sees the tokens of its own document and nothing else.

    Args:
        segments_BL: number of the document that each token belongs to, 0 for padding, shape (B, L).
        dtype: of the attention scores.

    Returns:
        shape (B, 1, L, L): 0 where attention is allowed, the dtype's lowest number elsewhere. Padding sees only padding,
        so that no row of the softmax is empty.
    """
    same = segments_BL[:, None, :, None] == segments_BL[:, None, None, :]
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill_(~same, torch.finfo(dtype).min)
