"""Where words begin among the tokens of a text, for objectives that choose whole words.

Shapes: L tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from engine.errors import UserError

MARKS = {"##": False, "Ġ": True, "▁": True}
"""How a vocabulary shows words: what a token begins with, and whether such a token begins a word (else it goes on with one)."""
BYTES = "Ġ"
"""The mark of vocabularies whose tokens are bytes, not letters."""
CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
BORDER = "\n"
"""Stands for a token that is not Chinese where words are looked for."""
LONG_WORD, MUCH = 20, 0.2
"""A text without spaces shows in so many tokens a word, in so large a share of its tokens."""


class Words:
    """The words of a vocabulary.

    Args:
        tokenizer: a fast one of transformers.
        segment: Chinese words are found by jieba; else they are what the vocabulary shows.

    Raises:
        UserError: the vocabulary marks neither beginnings nor continuations, or has no letters that could be read.
    """

    def __init__(self, tokenizer: Any, segment: bool) -> None:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.mark, self.begins_V = _marked(tokens, tokenizer.name_or_path)
        if segment and self.mark == BYTES:
            raise UserError(f"{tokenizer.name_or_path}: its tokens are bytes, not Chinese letters: leave out objective.segmenter")
        self.segment = segment
        letters = [token.removeprefix(self.mark) for token in tokens]
        self.chinese_V = np.asarray([CHINESE.fullmatch(each) is not None for each in letters])
        self.letters = [each if chinese else BORDER for each, chinese in zip(letters, self.chinese_V, strict=True)]
        self.lengths_V = np.asarray([len(each) for each in self.letters])

    def beginnings(self, tokens_L: np.ndarray) -> np.ndarray:
        """Returns for each token whether it begins a word, shape (L,)."""
        begins_L = self.begins_V[tokens_L]
        if not self.segment:
            return begins_L
        import rjieba

        text = "".join([self.letters[token] for token in tokens_L.tolist()])
        starts = np.zeros(len(text) + 1, dtype=bool)
        starts[np.cumsum([0, *map(len, rjieba.cut(text))])] = True
        lengths_L = self.lengths_V[tokens_L]
        found_L = starts[np.cumsum(lengths_L) - lengths_L]
        if MARKS[self.mark]:
            found_L |= begins_L
        return np.where(self.chinese_V[tokens_L], found_L, begins_L)

    def remarks(self, tokens_L: np.ndarray) -> list[str]:
        """Returns what is wrong with the words of a text, a line each."""
        if not self.segment and not MARKS[self.mark] and (share := self.chinese_V[tokens_L].mean()) > MUCH:
            return [
                f"{share:.0%} of the tokens are Chinese letters, each a word to this vocabulary: say objective.segmenter: jieba"
            ]
        sizes = np.diff(np.flatnonzero(np.append(self.beginnings(tokens_L), True)))
        share = sizes[sizes > LONG_WORD].sum() / max(1, len(tokens_L))
        if share > MUCH:
            return [
                f"{share:.0%} of the tokens lie in words of more than {LONG_WORD} tokens: a text without spaces, of which whole "
                "sentences are chosen at once: say objective.unit: token, or, for Chinese, objective.segmenter: jieba"
            ]
        return []


def _marked(tokens: list[str], name: str) -> tuple[str, np.ndarray]:
    """Returns (how a vocabulary shows words, for each id whether the token begins one)."""
    for mark, begins in MARKS.items():
        marked = np.asarray([token.startswith(mark) for token in tokens])
        if marked.sum() > len(tokens) // 100:
            return mark, marked if begins else ~marked
    raise UserError(f"{name}: its tokens do not show where words begin ({', '.join(MARKS)}): say objective.unit: token")
