"""Masked language modelling on packed rows (BERT, arXiv:1810.04805).

Shapes: L tokens of a piece.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from engine import objectives
from engine.config import Fraction
from engine.objectives import _tokens
from engine.objectives._tokens import IGNORED
from engine.objectives._words import Words

REMARKED_TOKENS = 1_000_000
"""Tokens whose words are looked at, at most."""
SPAN_STOPS, LONGEST_SPAN = 0.2, 10
"""Spans have a geometric number of words, up to a longest one, 3.6 on average (SpanBERT, arXiv:1907.10529, section 3.1)."""


class Config(objectives.ObjectiveConfig):
    """Masked language modelling (BERT, arXiv:1810.04805)."""

    type: Literal["mlm"] = "mlm"
    unit: Literal["token", "word", "span"] = "token"
    """What is chosen: single tokens; whole words, all tokens of one at once (BERT's later models); spans of words, which as one
    become [MASK] or random tokens, or stay (SpanBERT, arXiv:1907.10529)."""
    segmenter: Literal["jieba"] | None = None
    """Finds Chinese words, which are written without spaces; None: words are what the vocabulary shows."""
    mask: float = Field(0.15, gt=0, lt=1)
    """Share of the ordinary tokens that the model has to predict."""
    replace_by_mask: Fraction = 0.8
    """Share of the chosen tokens that become [MASK]."""
    replace_by_random: Fraction = 0.1
    """Share of the chosen tokens that become a random token; the rest stay as they are."""

    @model_validator(mode="after")
    def _segmenter_is_used_and_there(self) -> Config:
        if self.segmenter is not None and self.unit == "token":
            raise ValueError("segmenter finds words, but tokens are chosen one by one: say unit: word, or span")
        if self.segmenter is not None and importlib.util.find_spec("rjieba") is None:
            raise ValueError("segmenter: jieba needs a package that is not there: pip install 'bothways[chinese]'")
        return self

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
        words: of the vocabulary; for units other than tokens.
    """

    head = "AutoModelForMaskedLM"
    operation = "masked"
    says = "masked language modelling"
    special_tokens = ("cls_token", "sep_token", "pad_token", "mask_token")

    def __init__(self, config: Config, vocab_size: int, mask_id: int, special_ids: list[int], words: Words | None = None) -> None:
        self.config = config
        self.words = words
        self.rate = span_rate(config.mask) if config.unit == "span" else config.mask
        self.mask_id = mask_id
        self.ordinary = np.setdiff1d(np.arange(vocab_size), special_ids)
        self.special = np.ones(max([vocab_size - 1, *special_ids]) + 1, dtype=bool)
        """Whether an id is never predicted."""
        self.special[self.ordinary] = False

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        words = None if config.unit == "token" else Words(tokenizer, config.segmenter is not None)
        return cls(config, len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids, words)

    def remarks(self, tokens_N: np.ndarray) -> list[str]:
        return [] if self.words is None else self.words.remarks(tokens_N[:REMARKED_TOKENS].astype(np.int64))

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids (corrupted) and labels, both of shape (L,); labels are IGNORED where nothing is predicted."""
        config = self.config
        special = self.special[tokens_L]
        chosen = self._chosen(tokens_L, special, rng) & ~special
        fate = rng.random(len(tokens_L))
        if config.unit == "span":
            runs = np.cumsum(np.diff(chosen, prepend=False))  # tokens of one span have one number
            _, first, number = np.unique(runs, return_index=True, return_inverse=True)
            fate = fate[first][number]
        random_ids = self.ordinary[rng.integers(0, len(self.ordinary), len(tokens_L))]
        corrupted = np.where(chosen & (fate < config.replace_by_mask), self.mask_id, tokens_L)
        randomly = chosen & (fate >= config.replace_by_mask) & (fate < config.replace_by_mask + config.replace_by_random)
        return {"input_ids": np.where(randomly, random_ids, corrupted), "labels": np.where(chosen, tokens_L, IGNORED)}

    def _chosen(self, tokens_L: np.ndarray, special_L: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns which tokens are chosen, special ones perhaps among them, shape (L,)."""
        if self.words is None:
            return rng.random(len(tokens_L)) < self.rate
        begins = self.words.beginnings(tokens_L) | special_L
        begins[1:] |= special_L[:-1]
        begins[0] = True
        word_L = np.cumsum(begins) - 1
        words = int(word_L[-1]) + 1
        if self.config.unit == "word":
            return (rng.random(words) < self.rate)[word_L]
        # Spans may have begun before the piece, so that its first words are chosen as often as all others.
        before = LONGEST_SPAN - 1
        starts = np.flatnonzero(rng.random(before + words) < self.rate)
        ends = starts + np.minimum(rng.geometric(SPAN_STOPS, len(starts)), LONGEST_SPAN)
        borders = np.zeros(before + words + 1, dtype=np.int64)
        np.add.at(borders, starts, 1)
        np.add.at(borders, np.minimum(ends, before + words), -1)
        return (np.cumsum(borders)[before:-1] > 0)[word_L]

    def begin(self, model: Any, tokens_N: np.ndarray) -> None:
        predict_frequencies(model, tokens_N)

    @classmethod
    def share(cls, config: Config) -> float:
        return config.mask


def span_rate(share: float) -> float:
    """Returns how often a span has to begin at a word so that, overlaps counted once, `share` of the words lies in spans."""
    reach = (1 - SPAN_STOPS) ** np.arange(LONGEST_SPAN)  # a span that began so many words before is still going on
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if 1 - np.prod(1 - middle * reach) > share else (middle, high)
    return low


def predict_frequencies(model: Any, tokens_N: np.ndarray) -> None:
    """Sets the bias of the vocabulary projection to the log frequencies of the tokens (Meister et al. 2023, arXiv:2212.09686).

    The weights then learn from the first step on what depends on the context, not first how frequent every token is.
    """
    import numpy as np
    import torch

    bias = model.get_output_embeddings().bias
    if bias is None:
        return
    counts = np.bincount(tokens_N, minlength=len(bias))[: len(bias)] + 1.0
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
