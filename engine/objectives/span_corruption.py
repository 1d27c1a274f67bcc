"""Span corruption on packed rows (T5, arXiv:1910.10683, section 3.3.4).

Shapes: L tokens of a piece.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from engine import objectives
from engine.errors import UserError
from engine.objectives import _seq2seq

SENTINEL = "<extra_id_{}>"
"""Name of the tokens that stand for the spans of a text, from 0 on, as T5's vocabularies have them."""
SENTINELS = 100
"""So many, in T5's vocabularies and in those that are learnt."""


class Config(objectives.ObjectiveConfig):
    """Span corruption (T5, arXiv:1910.10683)."""

    type: Literal["span_corruption"] = "span_corruption"
    mask: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that the encoder does not see."""
    mean_span: float = Field(3.0, ge=1)
    """Tokens of a span, on average."""


class Objective(_seq2seq.Objective):
    """The encoder reads a text in which each span is one sentinel; the decoder writes each sentinel and what it stands for.

    How many tokens are hidden and how many spans they make follows from the length of a piece alone, so that rows are packed by
    what is left of it. There are never more spans than sentinels: they are longer then.

    Args:
        config: what is hidden.
        sentinels: ids, in their order.
        around: how many tokens stand before and after a text.
        end: id of the end of a text, which the decoder writes last.
    """

    says = "span corruption"
    columns = _seq2seq.ENCODER
    beside = _seq2seq.DECODER
    added_tokens = tuple(SENTINEL.format(number) for number in range(SENTINELS))

    def __init__(self, config: Config, sentinels: list[int], around: tuple[int, int], end: int) -> None:
        self.config, self.sentinels, self.around, self.end = config, np.asarray(sentinels), around, end

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        vocabulary, frame = tokenizer.get_vocab(), cls.frame(tokenizer)
        ids = [vocabulary[name] for name in cls.added_tokens if name in vocabulary]
        return cls(config, ids, (len(frame.before), len(frame.after)), tokenizer.eos_token_id)

    @classmethod
    def require(cls, tokenizer: Any) -> None:
        """Raises UserError when it lacks a special token, or has no sentinels."""
        super().require(tokenizer)
        if SENTINEL.format(0) not in tokenizer.get_vocab():
            raise UserError(
                f"{tokenizer.name_or_path}: this tokenizer has no {SENTINEL.format(0)}, which {cls.says} needs: take "
                "that of a T5, or learn one (tokenizer: {train: {type: bpe}})"
            )

    def row_lengths(self, lengths: np.ndarray) -> np.ndarray:
        texts = lengths - sum(self.around)
        hidden, spans = parts(texts, self.config, len(self.sentinels))
        return lengths - hidden + spans

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns input_ids, decoder_input_ids and labels, which have other lengths than the tokens."""
        before, text, after = self.split(tokens_L)
        hidden, spans = (int(number) for number in parts(np.asarray(len(text)), self.config, len(self.sentinels)))
        kept = len(text) - hidden
        # What is seen and what is hidden take turns, and begin with what is seen.
        seen_lengths = shares(kept, spans, rng) if kept else np.zeros(spans, dtype=np.int64)
        turns = np.stack([seen_lengths, shares(hidden, spans, rng)], axis=1)
        is_hidden = np.repeat(np.tile([False, True], spans), turns.flatten())
        sentinels = self.sentinels[:spans]
        source = np.insert(text[~is_hidden], np.cumsum(turns[:, 0]), sentinels)
        starts = np.cumsum(turns[:, 1]) - turns[:, 1]
        target = np.insert(text[is_hidden], starts, sentinels)
        return self.columns_of(np.concatenate([before, source, after]), np.append(target, self.end))

    @classmethod
    def sides(cls, config: Config, length: int) -> tuple[int, int]:
        text = cls(config, list(range(SENTINELS)), (0, 1), 0).longest(length, 1)
        hidden, spans = parts(np.asarray(text), config)
        return length, int(hidden + spans) + 1


def parts(lengths: np.ndarray, config: Config, sentinels: int = SENTINELS) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hidden tokens, spans that they make) of texts of so many tokens, 1 or more.

    At least one token is hidden, and one is left where a text has two; each span holds a token, and follows one that is seen.
    """
    hidden = np.clip(np.rint(lengths * config.mask), 1, np.maximum(lengths - 1, 1)).astype(np.int64)
    most = np.minimum(np.minimum(hidden, np.maximum(lengths - hidden, 1)), sentinels)
    return hidden, np.clip(np.rint(hidden / config.mean_span), 1, most).astype(np.int64)


def shares(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts `total` into `count` whole numbers from 1 on, every way to do so as likely, shape (count,)."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1 if count > 1 else np.zeros(0, dtype=np.int64)
    return np.diff(cuts, prepend=0, append=total)
