"""How a model takes packed rows: whom a token sees, and where it stands.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.models.families import family_of
from engine.models.varlen import takes_lengths

SLIDING = "sliding_attention"
"""What configurations call a layer in which a token sees a window around itself."""


def packed_mask(
    segments_BL: torch.Tensor,
    dtype: torch.dtype,
    causal: bool = False,
    window: int | None = None,
    seen_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block-diagonal additive mask: a token sees the tokens of its own document and nothing else.

    Args:
        segments_BL: number of the document that each token belongs to, 0 for padding, shape (B, L).
        dtype: of the attention scores.
        causal: it sees only itself and what lies before it.
        window: it sees tokens up to so far away; causally, so many of them, itself among them. None: all.
        seen_BL: the same of what is seen, where that is another side of the same documents; None: they see themselves.

    Returns:
        shape (B, 1, L, L), with a second side the last is that of the second: 0 where attention is allowed, the dtype's lowest
        number elsewhere. Padding sees only padding, and everything where there is none: no row of the softmax is empty.
    """
    seen = segments_BL[:, None, :, None] == (segments_BL if seen_BL is None else seen_BL)[:, None, None, :]
    if causal or window is not None:
        places_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
        back_LL = places_L[:, None] - places_L[None, :]
        if causal:
            seen = seen & (back_LL >= 0)
        if window is not None:
            seen = seen & (back_LL < window if causal else back_LL.abs() <= window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def packed_inputs(
    model: Any, segments_BL: torch.Tensor, positions_BL: torch.Tensor, ends: torch.Tensor | None = None
) -> dict[str, Any]:
    """Returns the attention_mask and position_ids of packed rows as a family that takes them wants them; or where documents lie,
    in place of a mask, for a model that goes by that.

    Args:
        model: of a family whose row says `packed`.
        segments_BL: see `packed_mask`.
        positions_BL: place of each token in its document, from 0.
        ends: 0, then where each document ends in the flattened rows, padding as one of its own, int32.
    """
    config, family = model.config, family_of(model.config.model_type)
    offset = config.pad_token_id + 1 if family.positions == "after padding" else 0
    placed = {"position_ids": positions_BL + offset}
    length = segments_BL.shape[1]
    if ends is not None and takes_lengths(model, length):
        # A mask of four dimensions, which nobody reads, keeps transformers from making one.
        unread = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=segments_BL.device)
        return {"attention_mask": unread, **placed, "cu_seq_lens_q": ends, "max_length_q": length}
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ([SLIDING] if window and family.windowed else ["full_attention"]))
    masks = {
        kind: packed_mask(segments_BL, model.dtype, family.causal, window if kind == SLIDING else None) for kind in sorted(kinds)
    }
    return {"attention_mask": masks if len(masks) > 1 else masks.popitem()[1], **placed}


class _ToldPositions(torch.nn.Embedding):
    """A learnt table of positions that is told where every token stands: transformers' own counts from the row's beginning."""

    places_BL: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Returns shape (B, L, H), whatever it is asked."""
        return torch.nn.functional.embedding(self.places_BL, self.weight)


Side = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(token ids, segments, positions) of one side of packed rows, each of shape (B, L)."""


def packed_decoder(model: Any, source: Side, target: Side) -> torch.Tensor:
    """Returns the last hidden states of a decoder, shape (B, L, H), each document of which reads its own of the encoder.

    Args:
        model: an encoder and a decoder of a family whose row says `packed`.
        source: what the encoder reads.
        target: what the decoder has written.
    """
    read, written = source[1], target[1]
    for name, side in zip(family_of(model.config.model_type).position_tables, (source, target), strict=False):
        table = model.get_submodule(name)
        table.__class__ = _ToldPositions
        table.places_BL = side[2] + table.offset
    encoded = model.get_encoder()(input_ids=source[0], attention_mask=packed_mask(read, model.dtype))[0]
    hidden: torch.Tensor = model.get_decoder()(
        input_ids=target[0],
        attention_mask=packed_mask(written, model.dtype, causal=True),
        encoder_hidden_states=encoded,
        encoder_attention_mask=packed_mask(written, model.dtype, seen_BL=read),
        use_cache=False,
    )[0]
    return hidden


def permuted_inputs(
    segments_BL: torch.Tensor, order_BL: torch.Tensor, targets_BM: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns perm_mask and target_mapping, as a family with two streams of attention takes them (XLNet, arXiv:1906.08237).

    A token sees the context in its own document, and, where it is predicted, what stands before it in the order. Its content, but
    not the query that predicts it, sees itself. Places are relative to one another, so that packed documents need none.

    Args:
        segments_BL: see `packed_mask`.
        order_BL: place of each predicted token in the order, below 0 for context, shape (B, L).
        targets_BM: places of the tokens that are predicted, shape (B, M).
        dtype: of the hidden states.

    Returns:
        perm_mask, shape (B, L, L), 1 where the second token is hidden from the first; target_mapping, shape (B, M, L), one-hot.
    """
    other = segments_BL[:, :, None] != segments_BL[:, None, :]
    later = (order_BL[:, None, :] >= 0) & (order_BL[:, None, :] >= order_BL[:, :, None])
    return {
        "perm_mask": (other | later).to(dtype),
        "target_mapping": torch.nn.functional.one_hot(targets_BM, segments_BL.shape[1]).to(dtype),
    }


def vocabulary_scores(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Returns the scores of the vocabulary, shape (…, V), for hidden states of shape (…, H)."""
    family = family_of(model.config.model_type)
    if getattr(model.config, family.vocabulary_scale, False):
        hidden = hidden * getattr(model.config, family.hidden) ** -0.5
    for name in family.vocabulary_head:
        hidden = model.get_submodule(name)(hidden)
    return hidden + getattr(model, family.vocabulary_bias)[0] if family.vocabulary_bias else hidden
