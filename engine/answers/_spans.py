"""A question with the windows of its context, and the best spans over all of them.

Every span of tokens is scored once, by the window that scores it best. Shapes: L tokens of a window, T tokens of a context, A
lengths of a span in tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.answers._quotes import Place

NONE = 0
"""Place in every window of the token that stands for "no answer": the first one, as in BERT."""
_MARKS = ("Mn", "Mc", "Me")


class Window(NamedTuple):
    """One window of a context behind its question."""

    encoding: Any
    """Of `tokenizers`, with the special tokens."""
    first: int
    end: int
    """Places of the first token of the context, and behind the last one."""
    offset: int
    """Number of its first token among those of the context."""


class Encoded(NamedTuple):
    """A question and its context as the model reads them."""

    windows: list[Window]
    place_T2: np.ndarray
    """Characters of each token of the context: from, to."""
    cut: bool
    """The question was too long."""


class Found(NamedTuple):
    """What the scores of the windows of a context say."""

    places: list[Place]
    """The best spans, the best one first; without white space at their ends."""
    scores: list[float]
    """Probability of each among all spans, and "no answer" where that may be."""
    none: float
    """Probability of "no answer", 0 where that may not be."""
    difference: float
    """How much higher "no answer" scores than the best span."""


def room_for(tokenizer: Any, stride: int | None) -> tuple[int, int]:
    """Returns (tokens that neighbouring windows share, tokens of the longest question).

    The first is set in the tokenizer, which truncates, in place. A context keeps at least half of a window.

    Args:
        stride: the first number; None: a quarter of a window.

    Raises:
        ValueError: windows are not long enough.
    """
    length = tokenizer.truncation["max_length"]
    room = length - tokenizer.num_special_tokens_to_add(True)
    if room < 2:
        raise ValueError(f"windows of {length} tokens hold no question with a context: raise max_length")
    stride = min(length // 4, (room - 1) // 2) if stride is None else stride
    if not 0 <= stride <= room - 2:
        raise ValueError(f"windows of {length} tokens cannot share {stride}: stride must be below {room - 1}")
    tokenizer.enable_truncation(length, stride=stride, strategy="only_second", direction="right")
    return stride, min(room // 2, room - stride - 1)


def shortened(tokenizer: Any, text: str, size: int) -> str:
    """Returns the longest beginning of a text that has at most `size` tokens.

    Args:
        tokenizer: one that does not truncate.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends = [end for _, end in encoding.offsets[:size]]
    while len(encoding.ids) > size:  # a text that ends elsewhere may be cut into other tokens
        text = text[: ends.pop()] if ends else ""
        encoding = tokenizer.encode(text, add_special_tokens=False)
    return text


def placed(encoding: Any, stride: int, cut: bool) -> Encoded:
    """Returns the windows of an encoded pair, and the characters of the tokens of its context."""
    windows: list[Window] = []
    parts: list[np.ndarray] = [np.zeros((0, 2), dtype=np.int64)]
    offset = 0
    for each in [encoding, *encoding.overflowing]:
        inside_L = np.flatnonzero(np.array([sequence == 1 for sequence in each.sequence_ids]))
        first, end = (int(inside_L[0]), int(inside_L[-1]) + 1) if len(inside_L) else (0, 0)
        windows.append(Window(each, first, end, offset))
        new = 0 if len(windows) == 1 else stride
        parts.append(np.array(each.offsets[first:end], dtype=np.int64).reshape(-1, 2)[new:])
        offset += end - first - stride
    return Encoded(windows, np.concatenate(parts), cut)


def tokens_of(encoded: Encoded, place: Place) -> tuple[int, int]:
    """Returns the numbers of the first and of the last token of some characters, among those of the context.

    Raises:
        ValueError: no token stands for them.
    """
    start_T, end_T = encoded.place_T2.T
    hit_T = np.flatnonzero((start_T < place.end) & (end_T > place.start))
    if not len(hit_T):
        raise ValueError("becomes no token of this tokenizer")
    return int(hit_T[0]), int(hit_T[-1])


def inside(window: Window, first: int, last: int) -> tuple[int, int] | None:
    """Returns where the tokens `first` to `last` of the context stand in a window; None where it does not hold them all."""
    moved = window.first - window.offset
    return (first + moved, last + moved) if window.offset <= first and last + moved < window.end else None


def best_spans(
    encoded: Encoded, context: str, start_WL: np.ndarray, end_WL: np.ndarray, longest: int, count: int, may_be_none: bool
) -> Found:
    """Returns the best spans of a context.

    Args:
        start_WL, end_WL: scores of the tokens of each window.
        longest: tokens of a span.
        count: of spans to return, at most.
        may_be_none: "no answer" is one of the things that may be; its score is its smallest over the windows.
    """
    total = len(encoded.place_T2)
    lengths = max(1, min(longest, total))
    score_TA = np.full((total, lengths), -np.inf)
    read_T = np.array([start < end and not context[start:end].isspace() for start, end in encoded.place_T2.tolist()], dtype=bool)
    for window, start_L, end_L in zip(encoded.windows, start_WL, end_WL, strict=True) if total else ():
        part = slice(window.offset, window.offset + window.end - window.first)
        begins = np.where(read_T[part], start_L[window.first : window.end], -np.inf).astype(np.float64)
        ends = np.where(read_T[part], end_L[window.first : window.end], -np.inf).astype(np.float64)
        behind = np.concatenate([ends, np.full(lengths - 1, -np.inf)])
        own_TA = begins[:, None] + np.lib.stride_tricks.sliding_window_view(behind, lengths)[: len(begins)]
        score_TA[part] = np.maximum(score_TA[part], own_TA)
    none = float((start_WL[:, NONE].astype(np.float64) + end_WL[:, NONE]).min())
    return _ranked(score_TA, none if may_be_none else -np.inf, encoded, context, count)


def _ranked(score_TA: np.ndarray, none: float, encoded: Encoded, context: str, count: int) -> Found:
    flat = score_TA.ravel()
    top = max(none, float(flat.max(initial=-np.inf)))
    if top == -np.inf:
        return Found([], [], 0.0, 0.0)
    whole = top + np.log(np.exp(flat - top).sum() + np.exp(none - top))
    most = min(2 * count, len(flat))  # several tokens may stand for one character
    chosen = np.argpartition(-flat, most - 1)[:most] if most else np.zeros(0, dtype=np.int64)
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]
    found: dict[Place, float] = {}
    for number in chosen[np.isfinite(flat[chosen])].tolist():
        first, more = divmod(number, score_TA.shape[1])
        place = trimmed(Place(int(encoded.place_T2[first, 0]), int(encoded.place_T2[first + more, 1])), context)
        if len(found) < count:
            found.setdefault(place, float(flat[number]))
    scores = [float(np.exp(value - whole)) for value in found.values()]
    difference = none - next(iter(found.values())) if found and none > -np.inf else 0.0
    return Found(list(found), scores, float(np.exp(none - whole)), difference)


def trimmed(place: Place, context: str) -> Place:
    """Returns a place without white space at its ends, and with the combining marks of its last character."""
    start, end = place
    while start < end and context[start].isspace():
        start += 1
    while end > start and context[end - 1].isspace():
        end -= 1
    while start < end < len(context) and unicodedata.category(context[end]) in _MARKS:
        end += 1
    return Place(start, end)


def lengths_of(encoded: Sequence[Encoded]) -> np.ndarray:
    """Returns the tokens of each over all of its windows, shape (N,)."""
    return np.array([sum(sum(window.encoding.attention_mask) for window in each.windows) for each in encoded])
