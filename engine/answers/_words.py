"""Words of a text, and the tokens that stand for them: in windows that overlap where a text is longer than the model takes.

A word is what gets a tag: one that was given, or else a run of letters, a run of digits, a single character of a script that is
written without spaces, a single sign. Combining marks, joiners and variation selectors belong to the character before them.

Shapes: V words with a token, L tokens.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan; Myanmar; Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # radicals, kana, Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # Han, half-width kana
)
"""Scripts without spaces between words, as a class of characters."""
_WITH_MARKS = (range(0x20000), range(0xE0000, 0xE0200))
"""Where Unicode has combining marks and signs of format."""


class Words(NamedTuple):
    """A text with its words."""

    text: str
    places: list[tuple[int, int]]
    """Characters of each word: from, to."""
    given: bool
    """They were given, and not found by `split`."""

    def word(self, index: int) -> str:
        """Returns a word."""
        return self.between(index, index + 1)

    def between(self, first: int, end: int) -> str:
        """Returns the text of the words `first` to `end - 1`."""
        return self.text[slice(*self.place(first, end))]

    def place(self, first: int, end: int) -> tuple[int, int]:
        """Returns the characters, from and to, of the words `first` to `end - 1`."""
        return self.places[first][0], self.places[end - 1][1]


@functools.cache
def _pattern() -> re.Pattern[str]:
    every = (chr(code) for part in _WITH_MARKS for code in part)
    marks = "".join(character for character in every if unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf"))
    mark = f"[{re.escape(marks)}\U0001f3fb-\U0001f3ff]"
    letter, digit = rf"(?![{_SPACELESS}])[^\W\d_]", rf"(?![{_SPACELESS}])\d"
    return re.compile(rf"{letter}(?:{letter}|{mark})*|{digit}(?:{digit}|{mark})*|\S(?:{mark}|(?<=\u200d)\S)*")


def split(text: str) -> Words:
    """Returns the words of a text."""
    return Words(text, [found.span() for found in _pattern().finditer(text)], False)


def between_spaces(text: str) -> Words:
    """Returns the words of a text in which spaces stand between them and nowhere else."""
    return Words(text, [found.span() for found in re.finditer(r"\S+", text)], True)


def joined(words: Sequence[str]) -> Words:
    """Returns given words as a text with spaces between them."""
    places, start = [], 0
    for word in words:
        places.append((start, start + len(word)))
        start += len(word) + 1
    return Words(" ".join(words), places, True)


class Encoded(NamedTuple):
    """The tokens of a text: its windows, and where in them its words are read."""

    windows: list[Any]
    """Encodings of `tokenizers`, each with the special tokens."""
    word_V: np.ndarray
    """Numbers of the words that have a token, rising."""
    window_V: np.ndarray
    """The window in which each of them is read: of those that hold its first token, the one with most tokens around it."""
    position_V: np.ndarray
    """Place of its first token there."""


def overlap(tokenizer: Any, stride: int | None) -> None:
    """Lets neighbouring windows of a tokenizer that truncates share `stride` tokens, in place; None: a quarter of a window.

    Raises:
        ValueError: windows are not longer than that.
    """
    length = tokenizer.truncation["max_length"]
    room = length - tokenizer.num_special_tokens_to_add(False)
    stride = min(length // 4, room - 1) if stride is None else stride
    if not 0 <= stride < room:
        raise ValueError(f"windows of {length} tokens cannot share {stride}: stride must be below {max(room, 0)}")
    tokenizer.enable_truncation(length, stride=stride, direction="right")


def keep_spaces(tokenizer: Any) -> None:
    """Lets a tokenizer mark the space before a word only where one stands, in place.

    SentencePiece's put one before every text, and so before every word of a script without spaces. One that would not notice
    spaces then stays as it is.
    """
    from tokenizers.pre_tokenizers import Metaspace

    before = tokenizer.pre_tokenizer
    rules = json.loads(before.__getstate__()) if before is not None else {}
    marks = [rule for rule in rules.get("pretokenizers", [rules]) if rule.get("type") == "Metaspace"]
    if marks and marks[0].get("prepend_scheme", "always") != "never":
        sign = marks[0].get("replacement", "\u2581")
        tokenizer.pre_tokenizer = Metaspace(sign, "never")
        if not tokenizer.encode([" a"], is_pretokenized=True, add_special_tokens=False).tokens[0].startswith(sign):
            tokenizer.pre_tokenizer = before


def encode(tokenizer: Any, texts: Sequence[Words]) -> list[Encoded]:
    """Tokenizes texts word by word, by a tokenizer that was made ready by `overlap` and `keep_spaces`."""
    from tokenizers.pre_tokenizers import Metaspace

    first = " " if isinstance(tokenizer.pre_tokenizer, Metaspace) and tokenizer.pre_tokenizer.prepend_scheme == "never" else ""
    encoded = tokenizer.encode_batch([_pieces(words, first) for words in texts], is_pretokenized=True)
    stride = tokenizer.truncation["stride"]
    return [_placed([encoding, *encoding.overflowing], stride) for encoding in encoded]


def _pieces(words: Words, first: str) -> list[str]:
    """Returns every word, with a space before it where one stands there: some tokenizers tell a word by it.

    Args:
        first: what stands before the text.
    """
    text = words.text
    before = [(text[start - 1 : start] if start else first).isspace() for start, _ in words.places]
    return [f"{' ' * space}{text[start:end]}" for (start, end), space in zip(words.places, before, strict=True)]


def _placed(windows: list[Any], stride: int) -> Encoded:
    found: list[np.ndarray] = []
    step = 0
    for number, window in enumerate(windows):
        word_L = np.array([-1 if word is None else word for word in window.word_ids], dtype=np.int64)
        place_L = np.flatnonzero(word_L >= 0)
        count = np.arange(len(place_L))
        step = step or len(place_L) - stride
        before = count if number else count + len(word_L)
        behind = len(place_L) - 1 - count if number < len(windows) - 1 else count + len(word_L)
        room = np.minimum(before, behind)
        found.append(np.stack([word_L[place_L], number * step + count, -room, np.full_like(count, number), place_L]))
    word, token, room, window_, place = np.concatenate(found, axis=1)
    order = np.lexsort((window_, room, token, word))
    chosen = order[np.unique(word[order], return_index=True)[1]]
    return Encoded(windows, word[chosen], window_[chosen], place[chosen])
