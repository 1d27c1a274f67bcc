"""Models that are built from scratch: their shape, their configuration, their first weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from engine.config import Strict
from engine.models import auto_class, by_rows, default_attention
from engine.models.families import FAMILIES, NEW, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ScratchConfig(Strict):
    """Shape of a model that is built from scratch."""

    family: str = NEW
    """Architecture, among those that take packed rows."""
    layers: int = Field(12, ge=1)
    hidden: int = Field(768, ge=8)
    heads: int = Field(12, ge=1)
    intermediate: int | None = Field(None, ge=1)
    """Neurons of the feed-forward layer; None: 4 × hidden."""
    positions: int = Field(512, ge=8)
    """Longest sequence in tokens."""

    @model_validator(mode="after")
    def _takes_packed_rows(self) -> ScratchConfig:
        if not family_of(self.family).pretrains:
            known = ", ".join(name for name, row in FAMILIES.items() if row.pretrains)
            raise ValueError(f"family: models of type '{self.family}' take no packed rows: pretraining builds {known}")
        return self

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> ScratchConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is not a multiple of heads={self.heads}: change one of them")
        return self


def build_model(
    shape: ScratchConfig, head: str, vocab_size: int, ids: Mapping[str, int | None], attention: str | None = None
) -> PreTrainedModel:
    """Returns a randomly initialised model; draw with torch.manual_seed before calling.

    Args:
        shape: its size.
        head: see `load_model`.
        vocab_size: rows of its table of tokens.
        ids: entries of the configuration that name special tokens, see `special_ids`.
        attention: see `load_model`.
    """
    from transformers import AutoConfig

    family, defaults = family_of(shape.family), AutoConfig.for_model(shape.family)
    sizes: dict[str, int | None] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        **dict.fromkeys(family.neurons, shape.intermediate or 4 * shape.hidden),
    }
    for stack in family.stacks[1:]:
        sizes |= {stack.count: shape.layers, stack.heads: shape.heads}
    if family.decoder_start:
        sizes["decoder_start_token_id"] = ids.get(family.decoder_start, ids["pad_token_id"])
    if family.positions != "relative":
        unused = ((ids["pad_token_id"] or 0) + 1) if family.positions == "after padding" else 0
        sizes["max_position_embeddings"] = shape.positions + unused
    # What would else be that of the family's published size: as many heads of keys, as wide as the others, no narrower table.
    own = {
        "num_key_value_heads": shape.heads,
        "head_dim": shape.hidden // shape.heads,
        "forced_eos_token_id": ids.get("eos_token_id"),
        **{key: shape.hidden for key in family.as_wide},
    }
    sizes |= {key: value for key, value in own.items() if getattr(defaults, key, None) is not None}
    sizes |= {key: value for key, value in ids.items() if key == "pad_token_id" or getattr(defaults, key, None) is not None}
    sizes = {defaults.attribute_map.get(key, key): value for key, value in sizes.items()}  # some look at them at once
    config = AutoConfig.for_model(shape.family, vocab_size=vocab_size, **sizes)
    return by_rows(auto_class(head).from_config(config, attn_implementation=attention or default_attention()), head)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """Returns the entries of a configuration that name a tokenizer's special tokens.

    Where the end of a text pads, no token is named for padding: it has no embedding of its own then, and would never learn one.
    """
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    return {**ids, "pad_token_id": None} if ids["pad_token_id"] == ids["eos_token_id"] else ids
