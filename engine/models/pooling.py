"""Heads that read one token, found in every row by itself.

transformers finds that token by its place in the batch (the last one, though it may be padding) or by counting the ends of texts,
which must then be as many in every row. Here each row is looked at alone: a row's scores depend neither on its neighbours nor on
where padding lies, and the graph has a fixed shape.

Shapes: B rows, L tokens, H features.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from engine.models.families import family_of


def last_of(marked_BL: torch.Tensor) -> torch.Tensor:
    """Returns the place of the last marked token of each row, shape (B,); 0 where none is."""
    places_L = torch.arange(marked_BL.shape[1], device=marked_BL.device)
    return (marked_BL * places_L).argmax(dim=1)


def token_at(hidden_BLH: torch.Tensor, places_B: torch.Tensor) -> torch.Tensor:
    """Returns the features of one token of each row, shape (B, 1, H)."""
    index_B1H = places_B[:, None, None].expand(-1, 1, hidden_BLH.shape[2])
    return hidden_BLH.gather(1, index_B1H)


def _last_token(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Forward pass of a model whose head reads the last token: of each row the last one that is attended to."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    attended_BL = torch.ones_like(input_ids, dtype=model.dtype) if attention_mask is None else attention_mask
    output = model.base_model(input_ids, attention_mask=attended_BL, **options)
    token_B1H = token_at(output.last_hidden_state, last_of(attended_BL))
    logits_BC = model.logits_proj(model.sequence_summary(token_B1H))
    return SequenceClassifierOutput(logits=logits_BC, hidden_states=output.hidden_states, attentions=output.attentions)


def decoder_start(config: Any) -> int:
    """Returns the token with which a decoder begins: without one in the configuration that of padding, as in T5."""
    start: int | None = getattr(config, "decoder_start_token_id", None)
    return config.pad_token_id if start is None else start


def _shifted(model: Any, ids_BL: torch.Tensor, attended_BL: torch.Tensor) -> torch.Tensor:
    """Returns what a decoder reads: the text behind a first token, which is a fixed one or that which ends each text."""
    if family_of(model.config.model_type).decoder_wraps:
        first_B1 = ids_BL.gather(1, last_of(attended_BL)[:, None])
    else:
        first_B1 = torch.full_like(ids_BL[:, :1], decoder_start(model.config))
    return torch.cat([first_B1, ids_BL[:, :-1]], dim=1)


def _end_of_text(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
    """Forward pass of an encoder-decoder whose head reads the decoder at the last end-of-text token of each row.

    A row that has none is read at its last token. The layers of the encoder come before those of the decoder in what it returns.
    """
    from transformers.modeling_outputs import SequenceClassifierOutput

    attended_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    shifted_BL = _shifted(model, input_ids, attended_BL)
    output = model.base_model(input_ids, attention_mask=attended_BL, decoder_input_ids=shifted_BL, use_cache=False, **options)
    ends_BL = (input_ids == model.config.eos_token_id) * attended_BL
    places_B = torch.where(ends_BL.any(dim=1), last_of(ends_BL), last_of(attended_BL))
    logits_BC = model.classification_head(token_at(output.last_hidden_state, places_B)[:, 0])
    hidden, maps = output.encoder_hidden_states, output.encoder_attentions
    return SequenceClassifierOutput(
        logits=logits_BC,
        hidden_states=None if hidden is None else (*hidden, *output.decoder_hidden_states[1:]),
        attentions=None if maps is None else (*maps, *output.decoder_attentions),
    )


def write_each_row(model: Any) -> None:
    """Lets the decoder of each row begin with its own last token, in place: transformers' way to find it needs more rows than one
    once the model is a graph."""

    def told(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        ids_BL = options["input_ids"]
        attended_BL = options.get("attention_mask", torch.ones_like(ids_BL))
        return inputs, {**options, "decoder_input_ids": _shifted(model, ids_BL, attended_BL)}

    model.register_forward_pre_hook(told, with_kwargs=True)


_FORWARDS = {"last": _last_token, "end": _end_of_text}


def pool_each_row(model: Any) -> None:
    """Gives a classifier whose family reads one token a forward pass that finds it in each row, in place; others stay."""
    pooled = family_of(model.config.model_type).pooled
    if pooled:
        model.forward = types.MethodType(_FORWARDS[pooled], model)
