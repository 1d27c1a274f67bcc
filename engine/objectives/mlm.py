"""Masked language modelling on packed rows (BERT, arXiv:1810.04805).

Shapes: L tokens of a piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from engine import objectives
from engine.config import Fraction
from engine.objectives import _tokens
from engine.objectives._tokens import IGNORED

if TYPE_CHECKING:
    from engine.data.corpus import Corpus

FREQUENCY_TOKENS = 10_000_000
"""Tokens from the top of the corpus from which frequencies are estimated."""


class Config(objectives.ObjectiveConfig):
    """Masked language modelling (BERT, arXiv:1810.04805)."""

    type: Literal["mlm"] = "mlm"
    mask: float = Field(0.15, gt=0, lt=1)
    """Share of the ordinary tokens that the model has to predict."""
    replace_by_mask: Fraction = 0.8
    """Share of the chosen tokens that become [MASK]."""
    replace_by_random: Fraction = 0.1
    """Share of the chosen tokens that become a random token; the rest stay as they are."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Config:
        if self.replace_by_mask + self.replace_by_random > 1:
            raise ValueError("replace_by_mask + replace_by_random is above 1: lower one of them")
        return self


class Objective(_tokens.Objective):
    """The MLM objective.

    Args:
        config: masking shares.
        vocab_size: ids from which random replacements are drawn.
        mask_id: id of [MASK].
        special_ids: ids that are never predicted.
    """

    head = "AutoModelForMaskedLM"
    says = "masked language modelling"
    special_tokens = ("cls_token", "sep_token", "pad_token", "mask_token")

    def __init__(self, config: Config, vocab_size: int, mask_id: int, special_ids: list[int]) -> None:
        self.config = config
        self.mask_id = mask_id
        self.ordinary = np.setdiff1d(np.arange(vocab_size), special_ids)
        self.special = np.ones(max([vocab_size - 1, *special_ids]) + 1, dtype=bool)
        """Whether an id is never predicted."""
        self.special[self.ordinary] = False

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        return cls(config, len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids (corrupted) and labels, both of shape (L,); labels are IGNORED where nothing is predicted."""
        config = self.config
        chosen = (rng.random(len(tokens_L)) < config.mask) & ~self.special[tokens_L]
        fate = rng.random(len(tokens_L))
        random_ids = self.ordinary[rng.integers(0, len(self.ordinary), len(tokens_L))]
        corrupted = np.where(chosen & (fate < config.replace_by_mask), self.mask_id, tokens_L)
        randomly = chosen & (fate >= config.replace_by_mask) & (fate < config.replace_by_mask + config.replace_by_random)
        return {"input_ids": np.where(randomly, random_ids, corrupted), "labels": np.where(chosen, tokens_L, IGNORED)}

    def begin(self, model: Any, corpus: Corpus) -> None:
        predict_frequencies(model, corpus)

    @classmethod
    def share(cls, config: Config) -> float:
        return config.mask


def predict_frequencies(model: Any, corpus: Corpus) -> None:
    """Sets the bias of the vocabulary projection to the log frequencies of the tokens (Meister et al. 2023, arXiv:2212.09686).

    The weights then learn from the first step on what depends on the context, not first how frequent every token is.
    """
    import numpy as np
    import torch

    bias = model.get_output_embeddings().bias
    if bias is None:
        return
    counts = np.bincount(corpus.tokens[:FREQUENCY_TOKENS], minlength=len(bias))[: len(bias)] + 1.0
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
