"""Permutation language modelling on packed rows (XLNet, arXiv:1906.08237).

Shapes: L tokens of a piece or a row, B rows, M predicted tokens of the row with the most, H features, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from engine import objectives
from engine.errors import UserError
from engine.objectives import Frame, Piece, _tokens
from engine.objectives._tokens import IGNORED

if TYPE_CHECKING:
    import torch

    Batch = dict[str, torch.Tensor]

CONTEXT = -1
"""Place in the order of a token that is not predicted: every token sees it."""


class Config(objectives.ObjectiveConfig):
    """Permutation language modelling (XLNet, arXiv:1906.08237)."""

    type: Literal["plm"] = "plm"
    one_in: int = Field(6, ge=2)
    """One in so many tokens is predicted (the paper's K, section 2.3)."""
    longest: int = Field(5, ge=1)
    """Tokens of the longest run that is predicted; a run's length is drawn evenly from 1 on (section 3.1)."""


class Objective(_tokens.Objective):
    """Tokens in runs, each predicted from what is not predicted and from those before it in a random order of their own.

    The columns are input_ids, which stay as they are, labels, token_type_ids and `order`: CONTEXT, or a predicted token's place
    in the order of its piece.

    Args:
        config: what is predicted.
        special_ids: ids that are never predicted.
        types: token_type_ids of what stands before and after a piece, as its tokenizer gives them.
    """

    head = "AutoModelForCausalLM"
    operation = "permuted"
    says = "permutation language modelling"
    special_tokens = ("pad_token",)
    columns = {**_tokens.Objective.columns, "order": CONTEXT, "token_type_ids": 0}

    def __init__(self, config: Config, special_ids: list[int], types: tuple[list[int], list[int]]) -> None:
        self.config, self.special, self.types = config, np.asarray(special_ids), types

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        return cls(config, tokenizer.all_special_ids, _tokens.around(tokenizer, "token_type_ids"))

    @classmethod
    def require(cls, tokenizer: Any) -> None:
        """Raises UserError when it has no padding token, or puts nothing around a text: the first token of an order sees that."""
        super().require(tokenizer)
        if not any(_tokens.around(tokenizer, "input_ids")):
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer puts no special token around a text, which {cls.says} needs: "
                "set a post_processor in its tokenizer.json"
            )

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns what the tokenizer puts around a text: [CLS] before and [SEP] after it, or both after it, as XLNet's does."""
        return _tokens.frame_of(tokenizer)

    def arrange(self, piece: Piece, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens, _ = super().arrange(piece, rng)
        types = np.concatenate([self.types[0], np.zeros(len(piece.tokens)), self.types[1]]).astype(np.int64)
        return tokens, {"token_type_ids": types}

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids, which are the tokens, labels, and the order of the predicted ones."""
        chosen = np.zeros(len(tokens_L), dtype=bool)
        at = 0
        while at < len(tokens_L):
            run = int(rng.integers(1, self.config.longest + 1))
            reach = run * self.config.one_in
            first = at + int(rng.integers(reach - run + 1))
            chosen[first : first + run] = True
            at += reach
        chosen &= ~np.isin(tokens_L, self.special)
        order = np.where(chosen, rng.permutation(len(tokens_L)), CONTEXT)
        return {"input_ids": tokens_L, "labels": np.where(chosen, tokens_L, IGNORED), "order": order}

    def placed(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns `predicted`; `targets`, the places of the predicted tokens of each row, shape (B, most of a row), filled up
        with any others where there are fewer; `queries` (M,), places in the flattened targets that are of predicted tokens."""
        predicted_BL = arrays["labels"] != IGNORED
        counts_B = predicted_BL.sum(1)
        most = max(1, int(counts_B.max()))
        # The places of the predicted tokens come first, in their order in the text.
        targets_BM = np.argsort(~predicted_BL, axis=1, kind="stable")[:, :most]
        queries_M = np.flatnonzero(np.arange(most) < counts_B[:, None])
        return {**super().placed(arrays), "targets": targets_BM, "queries": queries_M}

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy over the predicted tokens.

        Args:
            model: of a family with two streams of attention.
            batch: input_ids, token_type_ids, labels, order, segments, each (B, L) int64; segment 0 is padding; predicted (M,),
                targets and queries (see `placed`).

        Returns:
            (summed loss, number of predicted tokens), two scalars.
        """
        import torch

        labels_M = _tokens.picked(batch["labels"], batch["predicted"])
        return _tokens.cross_entropy(model, _query_stream(model, batch), labels_M), torch.tensor(len(labels_M))

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """Returns the scores of the predicted tokens, shape (number of them in the batch, V)."""
        from engine.models.attention import vocabulary_scores

        return vocabulary_scores(model, _query_stream(model, batch))

    @classmethod
    def made_up_loss(cls, config: Config, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch

        ids = torch.zeros(rows, length, dtype=torch.int64)
        # How many tokens are predicted is drawn at random in training; shapes without values need a number.
        targets_BM = torch.zeros(rows, math.ceil(length / config.one_in), dtype=torch.int64)
        names = ("input_ids", "token_type_ids", "segments", "order")
        hidden_BMH = _hidden_of(model, dict.fromkeys(names, ids), targets_BM)
        return _tokens.cross_entropy(model, hidden_BMH.flatten(0, 1), targets_BM.flatten())


def _query_stream(model: Any, batch: Batch) -> torch.Tensor:
    """Returns the hidden states from which tokens are predicted, shape (predicted tokens of the batch, H), row by row."""
    return _tokens.picked(_hidden_of(model, batch, batch["targets"]), batch["queries"])


def _hidden_of(model: Any, batch: Batch, targets_BM: torch.Tensor) -> torch.Tensor:
    """Returns the last hidden states of the queries that predict the tokens at these places, shape (B, M, H)."""
    from engine.models.attention import permuted_inputs

    inputs = permuted_inputs(batch["segments"], batch["order"], targets_BM, model.dtype)
    taken = {name: batch[name] for name in ("input_ids", "token_type_ids")}
    hidden: torch.Tensor = model.base_model(**taken, use_mems=False, **inputs)[0]
    return hidden
