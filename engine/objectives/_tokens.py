"""What objectives share that score the vocabulary at some tokens of packed rows.

Shapes: B rows, L tokens a row, M predicted tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engine import objectives

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORED = -100
"""Label of a token that is not predicted, as in torch's cross entropy."""
CHUNK_SCORES = 2**26
"""Scores that are kept for the backward pass, 256 MiB of them; of more, those of a part of the tokens are computed again."""


class Objective(objectives.Objective):
    """An objective with the columns input_ids and labels: a label is what is scored from the hidden state at its place."""

    columns = {"input_ids": None, "labels": IGNORED}

    @classmethod
    def adapt(cls, model: Any) -> None:
        """Adds the bias of the vocabulary, where there is one, in float32."""
        from engine.models.vocabulary import VocabularyProjection

        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().__class__ = VocabularyProjection

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the predicted tokens.

        Args:
            model: with the head of this objective, of a family that takes packed rows.
            batch: input_ids, position_ids, segments, labels, each (B, L) int64; segment 0 is padding; predicted (M,), places in
                the flattened rows.

        Returns:
            (summed loss, number of predicted tokens), two scalars.
        """
        return token_loss(model, hidden_of(model, batch), batch)

    def logits(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scores of the predicted tokens, shape (M, V)."""
        return token_logits(model, hidden_of(model, batch), batch)

    def placed(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"predicted": chosen(arrays["labels"])}

    def count(self, arrays: dict[str, np.ndarray]) -> int:
        return int((arrays["labels"] >= 0).sum())

    @classmethod
    def share(cls, config: Any) -> float:
        """Returns how many of the tokens are predicted, at most."""
        raise NotImplementedError

    @classmethod
    def made_up_loss(cls, config: Any, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch

        ids = torch.zeros(rows, length, dtype=torch.int64)
        hidden = hidden_of(model, {"input_ids": ids, "segments": ids, "position_ids": ids.clone()})
        # How many tokens are predicted is drawn at random in training; shapes without values need a number.
        predicted_M = torch.zeros(math.ceil(rows * length * cls.share(config)), dtype=torch.int64)
        return cross_entropy(model, hidden.flatten(0, 1)[predicted_M], predicted_M)


def around(tokenizer: Any, what: str) -> tuple[list[int], list[int]]:
    """Returns what a tokenizer puts before and after the tokens of a text: `input_ids` or `token_type_ids`."""
    text = "a"
    whole = tokenizer(text, return_token_type_ids=True)
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    at = next(place for place in range(len(whole["input_ids"])) if whole["input_ids"][place : place + len(bare)] == bare)
    return whole[what][:at], whole[what][at + len(bare) :]


def frame_of(tokenizer: Any) -> objectives.Frame:
    """Returns what a tokenizer puts around a text."""
    before, after = around(tokenizer, "input_ids")
    return objectives.Frame(tuple(before), tuple(after))


def hidden_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the last hidden states of packed rows, shape (B, L, H)."""
    from engine.models.attention import packed_inputs

    packed = packed_inputs(model, batch["segments"], batch["position_ids"], batch.get("ends"))
    if "token_type_ids" in batch:
        packed["token_type_ids"] = batch["token_type_ids"]
    hidden: torch.Tensor = model.base_model(input_ids=batch["input_ids"], **packed)[0]
    return hidden


def token_loss(model: Any, hidden_BLH: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (summed loss of the predicted tokens, how many they are), given the last hidden states."""
    import torch

    at_M = batch["predicted"]
    return cross_entropy(model, picked(hidden_BLH, at_M), picked(batch["labels"], at_M)), torch.tensor(len(at_M))


def token_logits(model: Any, hidden_BLH: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the scores of the predicted tokens, shape (M, V), given the last hidden states."""
    from engine.models.attention import vocabulary_scores

    return vocabulary_scores(model, picked(hidden_BLH, batch["predicted"]))


def chosen(labels_BL: np.ndarray) -> np.ndarray:
    """Returns the places of labels in the flattened rows, shape (number of them,)."""
    import numpy as np

    return np.flatnonzero(labels_BL != IGNORED)


def picked(values_BL: torch.Tensor, at_M: torch.Tensor) -> torch.Tensor:
    """Returns what stands at places of the flattened rows, shape (M, …)."""
    return values_BL.flatten(0, 1).index_select(0, at_M)


def cross_entropy(model: Any, hidden_MH: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Returns the summed loss of the predicted tokens; only they go through the vocabulary projection, the dearest matrix of a
    small model, and never more of them at once than CHUNK_SCORES allows."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    from engine.models.attention import vocabulary_scores

    def summed(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(vocabulary_scores(model, hidden).float(), labels, reduction="sum")

    size = max(1, CHUNK_SCORES // model.config.vocab_size)
    if len(labels_M) <= size:
        return summed(hidden_MH, labels_M)
    parts = [
        checkpoint(summed, *part, use_reentrant=False) for part in zip(hidden_MH.split(size), labels_M.split(size), strict=True)
    ]
    return torch.stack(parts).sum()
