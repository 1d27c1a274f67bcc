"""Masked language modelling on packed rows (BERT, arXiv:1810.04805).

Shapes: B rows, L tokens a row, M predicted tokens in the batch, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from engine.models.attention import packed_mask
from engine.objectives import MlmConfig

IGNORED = -100
"""Label of a token that is not predicted, as in torch's cross entropy."""


class MaskedLanguageModelling:
    """The MLM objective.

    Args:
        config: masking shares.
        vocab_size: ids from which random replacements are drawn.
        mask_id: id of [MASK].
        special_ids: ids that are never predicted.
    """

    def __init__(self, config: MlmConfig, vocab_size: int, mask_id: int, special_ids: list[int]) -> None:
        self.config = config
        self.mask_id = mask_id
        self.special = np.asarray(sorted(set(special_ids)))
        self.ordinary = np.setdiff1d(np.arange(vocab_size), self.special)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns (corrupted tokens, labels), both of shape (L,); labels are IGNORED where nothing is predicted."""
        config = self.config
        chosen = (rng.random(len(tokens_L)) < config.mask) & ~np.isin(tokens_L, self.special)
        fate = rng.random(len(tokens_L))
        random_ids = self.ordinary[rng.integers(0, len(self.ordinary), len(tokens_L))]
        corrupted = np.where(chosen & (fate < config.replace_by_mask), self.mask_id, tokens_L)
        randomly = chosen & (fate >= config.replace_by_mask) & (fate < config.replace_by_mask + config.replace_by_random)
        return np.where(randomly, random_ids, corrupted), np.where(chosen, tokens_L, IGNORED)

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the predicted tokens.

        Args:
            model: a `…ForMaskedLM` with a base model and a head named `cls`.
            batch: input_ids, position_ids, segments, labels, each (B, L) int64; segment 0 is padding.

        Returns:
            (summed loss, number of predicted tokens), two scalars.
        """
        labels_BL = batch["labels"]
        logits_MV = self.logits(model, batch)
        total = functional.cross_entropy(logits_MV.float(), labels_BL[labels_BL != IGNORED], reduction="sum")
        return total, (labels_BL != IGNORED).sum()

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scores of the predicted tokens, shape (M, V); only they go through the vocabulary projection, the dearest
        matrix of a small model."""
        mask = packed_mask(batch["segments"], model.dtype)
        base = model.base_model
        hidden = base(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask)[0]
        return model.cls(hidden[batch["labels"] != IGNORED])
