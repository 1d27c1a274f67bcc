"""Masked language modelling on packed rows (BERT, arXiv:1810.04805).

Shapes: B rows, L tokens a row, M predicted tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from engine import objectives
from engine.config import Fraction
from engine.models.families import family_for_packing

if TYPE_CHECKING:
    import torch

    from engine.data.corpus import Corpus

IGNORED = -100
"""Label of a token that is not predicted, as in torch's cross entropy."""
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


class Objective(objectives.Objective):
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
    columns = {"input_ids": None, "labels": IGNORED}

    def __init__(self, config: Config, vocab_size: int, mask_id: int, special_ids: list[int]) -> None:
        self.config = config
        self.mask_id = mask_id
        self.special = np.asarray(sorted(set(special_ids)))
        self.ordinary = np.setdiff1d(np.arange(vocab_size), self.special)

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        return cls(config, len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids (corrupted) and labels, both of shape (L,); labels are IGNORED where nothing is predicted."""
        config = self.config
        chosen = (rng.random(len(tokens_L)) < config.mask) & ~np.isin(tokens_L, self.special)
        fate = rng.random(len(tokens_L))
        random_ids = self.ordinary[rng.integers(0, len(self.ordinary), len(tokens_L))]
        corrupted = np.where(chosen & (fate < config.replace_by_mask), self.mask_id, tokens_L)
        randomly = chosen & (fate >= config.replace_by_mask) & (fate < config.replace_by_mask + config.replace_by_random)
        return {"input_ids": np.where(randomly, random_ids, corrupted), "labels": np.where(chosen, tokens_L, IGNORED)}

    @classmethod
    def adapt(cls, model: Any) -> None:
        """Adds the bias of the vocabulary in float32."""
        from engine.models.vocabulary import VocabularyProjection

        model.get_output_embeddings().__class__ = VocabularyProjection

    def begin(self, model: Any, corpus: Corpus) -> None:
        predict_frequencies(model, corpus)

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the predicted tokens.

        Args:
            model: a `…ForMaskedLM` of a family that takes packed rows.
            batch: input_ids, position_ids, segments, labels, each (B, L) int64; segment 0 is padding.

        Returns:
            (summed loss, number of predicted tokens), two scalars.
        """
        from torch.nn import functional

        labels_BL = batch["labels"]
        logits_MV = self.logits(model, batch)
        total = functional.cross_entropy(logits_MV.float(), labels_BL[labels_BL != IGNORED], reduction="sum")
        return total, (labels_BL != IGNORED).sum()

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scores of the predicted tokens, shape (M, V); only they go through the vocabulary projection, the dearest
        matrix of a small model."""
        from engine.models.attention import packed_mask

        mask = packed_mask(batch["segments"], model.dtype)
        base = model.base_model
        hidden = base(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask)[0]
        return _head(model)(hidden[batch["labels"] != IGNORED])

    def count(self, arrays: dict[str, np.ndarray]) -> int:
        return int((arrays["labels"] >= 0).sum())

    @classmethod
    def made_up_loss(cls, config: Config, model: Any, rows: int, length: int) -> torch.Tensor:
        """Returns a loss of rows of which the share `mask` is predicted."""
        import torch
        from torch.nn import functional

        from engine.models.attention import packed_mask

        ids = torch.zeros(rows, length, dtype=torch.int64)
        mask_additive = packed_mask(ids, model.dtype)
        hidden = model.base_model(input_ids=ids, position_ids=ids.clone(), attention_mask=mask_additive)[0]
        # How many tokens are predicted is drawn at random in training; shapes without values need a number.
        predicted = torch.zeros(math.ceil(rows * length * config.mask), dtype=torch.int64)
        logits_MV = _head(model)(hidden.flatten(0, 1)[predicted])
        return functional.cross_entropy(logits_MV.float(), predicted, reduction="sum")


def _head(model: Any) -> Any:
    """Returns what scores the vocabulary, from hidden states."""
    return model.get_submodule(family_for_packing(model.config.model_type).vocabulary_head)


def predict_frequencies(model: Any, corpus: Corpus) -> None:
    """Sets the bias of the vocabulary projection to the log frequencies of the tokens (Meister et al. 2023, arXiv:2212.09686).

    The weights then learn from the first step on what depends on the context, not first how frequent every token is.
    """
    import numpy as np
    import torch

    bias = model.get_output_embeddings().bias
    counts = np.bincount(corpus.tokens[:FREQUENCY_TOKENS], minlength=len(bias))[: len(bias)] + 1.0
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
