"""Denoising on packed rows: text infilling and permuted sentences (BART, arXiv:1910.13461; mBART, arXiv:2001.08210).

Shapes: L tokens of a piece.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from engine import objectives
from engine.objectives import Frame, Piece, _seq2seq


class Config(objectives.ObjectiveConfig):
    """Denoising (BART, arXiv:1910.13461; mBART, arXiv:2001.08210)."""

    type: Literal["denoising"] = "denoising"
    mask: float = Field(0.3, gt=0, lt=1)
    """Share of the tokens that are hidden; mBART: 0.35."""
    mean_span: float = Field(3.0, ge=1)
    """Tokens of a span, the mean of a Poisson distribution; mBART: 3.5. Spans of none become a [MASK] too."""
    permute_sentences: bool = True
    """The encoder reads the sentences of a piece in no order."""


class Objective(_seq2seq.Objective):
    """The encoder reads a text in which every span is one [MASK], and its sentences in no order; the decoder writes the text.

    Rows are packed by what the decoder writes. The encoder never reads more.

    Args:
        config: what is done to the text.
        mask_id: id of [MASK].
        around: how many tokens stand before and after a text.
    """

    says = "denoising"
    special_tokens = (*_seq2seq.Objective.special_tokens, "mask_token")
    columns = _seq2seq.DECODER
    beside = _seq2seq.ENCODER
    sentences = True

    def __init__(self, config: Config, mask_id: int, around: tuple[int, int]) -> None:
        self.config, self.mask_id, self.around = config, mask_id, around

    @classmethod
    def frame(cls, tokenizer: Any, language: str | None = None) -> Frame:
        """Returns what the tokenizer puts around a text; with a tag where it puts that of a language, or else behind it."""
        own = super().frame(tokenizer)
        if language is None:
            return own
        if not hasattr(tokenizer, "src_lang"):
            return own._replace(after=(*own.after, tokenizer.convert_tokens_to_ids(language)))
        before, tokenizer.src_lang = tokenizer.src_lang, language
        try:
            return super().frame(tokenizer)
        finally:
            tokenizer.src_lang = before

    @classmethod
    def of_tokenizer(cls, config: Config, tokenizer: Any) -> Objective:
        frame = cls.frame(tokenizer)
        return cls(config, tokenizer.mask_token_id, (len(frame.before), len(frame.after)))

    def make(self, piece: Piece, rng: np.random.Generator) -> dict[str, np.ndarray]:
        target, _ = self.arrange(piece, rng)
        text = piece.tokens
        if self.config.permute_sentences and len(piece.sentences):
            sentences = np.split(text, piece.sentences)
            text = np.concatenate([sentences[number] for number in rng.permutation(len(sentences))])
        return self._columns(piece.before, text, piece.after, target, rng)

    def corrupt(self, tokens_L: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the columns of a text whose sentences stay in their order, given with its frame."""
        before, text, after = self.split(tokens_L)
        return self._columns(before, text, after, tokens_L, rng)

    def _columns(self, before: Any, text: np.ndarray, after: Any, target: np.ndarray, rng: Any) -> dict[str, np.ndarray]:
        """Returns the columns, given the text that is to be infilled, with its frame, and what the decoder writes."""
        return self.columns_of(np.concatenate([before, self.infilled(text, rng), after]).astype(np.int64), target)

    def infilled(self, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a text with spans of it replaced by a [MASK] each, and as many more as spans of no token were drawn."""
        hidden = int(len(text) * self.config.mask + rng.random())
        drawn = rng.poisson(self.config.mean_span, hidden + 1)
        while drawn.sum() < hidden:
            drawn = np.concatenate([drawn, rng.poisson(self.config.mean_span, hidden + 1)])
        if not hidden:
            return text
        # The span that reaches the share is cut there; those that hold a token lie apart from one another where they can.
        count = int(np.searchsorted(np.cumsum(drawn), hidden)) + 1
        lengths = drawn[:count].copy()
        lengths[-1] -= lengths.sum() - hidden
        spans = lengths[lengths > 0]
        insertions = min(int((lengths == 0).sum()), hidden - len(spans))
        gaps = len(text) - hidden + 1  # before, between and behind the tokens that stay
        at = np.sort(rng.choice(gaps, len(spans), replace=len(spans) > gaps))
        starts = at + np.cumsum(spans) - spans
        kept = np.ones(len(text), dtype=bool)
        for start, length in zip(starts, spans, strict=True):
            kept[start : start + length] = False
        at = np.concatenate([at, rng.integers(0, gaps, insertions)])
        return np.insert(text[kept], np.sort(at), self.mask_id)

    @classmethod
    def sides(cls, config: Config, length: int) -> tuple[int, int]:
        return length, length
