"""Answers that are quoted from a text: how a cell holds them, where they stand, and how they are judged.

The figures are those of the official evaluations of SQuAD 1.1 and 2.0 (arXiv:1606.05250, arXiv:1806.03822).
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

REACH = 8
"""An answer that does not stand at its place is looked for so many characters before and behind it."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Quote(NamedTuple):
    """An answer as a row gives it."""

    text: str
    start: int | None
    """Its first character in the context; None: not told."""


class Place(NamedTuple):
    """Characters of a context: from, to (not included)."""

    start: int
    end: int


def quotes_of(value: Any) -> list[Quote]:
    """Returns the answers that a cell holds: texts, or SQuAD's objects `{"text", "answer_start"}`, or one object of two lists.

    An empty list says that there is none.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, dict) and isinstance(value.get("text"), (list, tuple)):
        texts, starts = value["text"], value.get("answer_start")
        if starts is not None and (not isinstance(starts, (list, tuple)) or len(starts) != len(texts)):
            raise ValueError(f"holds {len(texts)} texts and other answer_start: {value!r:.60}")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts or [None] * len(texts), strict=True)]
    elif isinstance(value, (str, dict)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"holds {value!r:.60}: write a list of answers with text and answer_start, an empty one for no answer")
    return [_quote(entry) for entry in value]


def _quote(entry: Any) -> Quote:
    if isinstance(entry, str):
        entry = {"text": entry}
    text, start = (entry.get("text"), entry.get("answer_start")) if isinstance(entry, dict) else (None, None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"holds an answer without a text ({entry!r:.60}): an empty list says that there is no answer")
    if start is not None and (type(start) is not int or start < 0):
        raise ValueError(f"holds the answer '{text:.40}' with answer_start {start!r:.20}: it is a number of characters, from 0")
    return Quote(text, start)


def right_answers(row: dict[str, Any], value: Any) -> list[Quote]:
    """Returns `quotes_of` a cell of a row, and none where the row's `is_impossible` says that there is none."""
    return [] if row.get("is_impossible") is True else quotes_of(value)


def place_of(quote: Quote, context: str) -> Place:
    """Returns where an answer stands: at its place, or else nearest to it within `REACH`; without a place, where it stands alone.

    Raises:
        ValueError: it does not, or nothing says which of several it is.
    """
    text, start = quote
    if start is None:
        found = context.find(text)
        if found < 0:
            raise ValueError(f"the answer '{text:.40}' does not stand in its context: quote it as it is written there")
        if context.find(text, found + 1) >= 0:
            raise ValueError(f"the answer '{text:.40}' stands in its context more than once: say which by answer_start")
        return Place(found, found + len(text))
    for step in sorted(range(-REACH, REACH + 1), key=abs):
        if start + step >= 0 and context.startswith(text, start + step):
            return Place(start + step, start + step + len(text))
    there, elsewhere = context[start : start + len(text)], context.find(text)
    hint = f"it does at {elsewhere}" if elsewhere >= 0 else "nor anywhere else in its context"
    raise ValueError(f"the answer '{text:.40}' does not stand at {start} ('{there:.40}' does), {hint}: mend answer_start")


def normalised(text: str) -> str:
    """Returns a text in lower case, without ASCII punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


class Score(NamedTuple):
    """How right an answer is: the best of all right ones, 0 to 1."""

    exact: float
    f1: float


@functools.lru_cache(maxsize=200_000)
def score(answer: str, truths: tuple[str, ...], may_be_none: bool) -> Score:
    """Judges an answer; "" is none.

    Args:
        truths: the right answers, none of them where there is none.
        may_be_none: by SQuAD 2.0, where two texts of which normalising leaves nothing are alike; by 1.1 their F1 is 0.
    """
    if may_be_none or not truths:
        truths = tuple(text for text in truths if normalised(text)) or ("",)
    own = normalised(answer)
    exact = float(any(own == normalised(text) for text in truths))
    return Score(exact, max(_f1(own.split(), normalised(text).split(), may_be_none) for text in truths))


def _f1(own: Sequence[str], other: Sequence[str], may_be_none: bool) -> float:
    if may_be_none and not (own and other):
        return float(own == other)
    common = sum((Counter(own) & Counter(other)).values())
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(other)
    return 2 * precision * recall / (precision + recall)
