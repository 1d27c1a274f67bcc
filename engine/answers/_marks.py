"""What the rows of a tagging task hold: a text or words, and tags of the words or spans of characters.

A label is a list: of tags, one for each word, or of spans [start, end, type], characters of the text from `start` to `end - 1`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.answers import Row, RowError
from engine.answers._schemes import OUTSIDE, SchemeError, Span, parse, spans_of
from engine.answers._texts import texts_of
from engine.answers._words import Words, between_spaces, joined, split


def are_tags(label: Any) -> bool:
    """Says whether a label holds tags, and not spans; an empty one may be either."""
    return isinstance(label, (list, tuple)) and bool(label) and all(isinstance(tag, str) for tag in label)


def words_of(row: Row, text: str, label: str) -> Words:
    """Returns the words of a row: those of a list; those between the spaces of a text with tags; else those of `split`.

    Args:
        text, label: the columns; `text` is also the name of the input.

    Raises:
        RowError: there is no text, or one that is not valid Unicode.
    """
    value = row.get(text, row.get("text"))
    if isinstance(value, (list, tuple)):
        words = joined([str(word) for word in value])
        texts_of({text: words.text}, {"text": text})
        return words
    (found,) = texts_of(row, {"text": text})
    return between_spaces(found) if are_tags(row.get(label)) else split(found)


def named_tag(tag: str, names: dict[str, str]) -> str:
    """Returns a tag as the task calls it: by its own new name, or with that of its type."""
    if tag in names:
        return names[tag]
    role, mark, kind = tag[:1], tag[1:2], tag[2:]
    return f"{role}{mark}{names[kind]}" if mark in ("-", "_") and mark and kind in names else tag


def tags_as_named(label: Any, words: Words, names: dict[str, str]) -> list[str]:
    """Returns the tags of the words.

    Raises:
        RowError: as many as words are not there.
    """
    if label and not are_tags(label):
        raise RowError("holds spans of characters, where other rows have tags: both cannot be learnt at once")
    if len(label) != len(words.places):
        raise RowError(f"has {len(words.places)} words and {len(label)} tags")
    return [named_tag(tag, names) for tag in label]


class Reading(NamedTuple):
    """How the truth of rows is read."""

    scheme: str | None
    """Of tags; None: they mark no entities."""
    names: dict[str, str]
    """Names instead of tags and types."""
    widen: bool
    """A span that begins or ends inside of a word, or beside one, gets all of it."""
    longest: bool
    """Of spans that share a word the longest is taken."""


def entities_of(label: Any, words: Words, reading: Reading) -> list[Span]:
    """Returns the entities of a row as spans of words, in order.

    Raises:
        RowError: tags that break their scheme; spans that lie outside of the text, over each other or at no borders of words.
    """
    if are_tags(label):
        tags = tags_as_named(label, words, reading.names)
        try:
            return spans_of(tags, reading.scheme or "bio")
        except SchemeError as error:
            where = f"word {error.index + 1}, '{words.word(error.index)}'"
            raise RowError(f"{where}: {error} (scheme {reading.scheme}: mend it, or name another, task.scheme)") from None
    found: list[Span] = []
    for span in sorted((_words_between(span, words, reading) for span in label), key=lambda span: span.first - span.end):
        other = next((kept for kept in found if kept.first < span.end and span.first < kept.end), None)
        if other is None:
            found.append(span)
        elif not reading.longest:
            both = " and ".join(f"'{words.between(each.first, each.end)}' ({each.type})" for each in (other, span))
            raise RowError(
                f"two spans share a word, {both}: remove one, or keep the longer of such spans (task.overlaps: longest)"
            )
    return sorted(found)


def _words_between(span: Sequence[Any], words: Words, reading: Reading) -> Span:
    start, end, kind = span
    shown = f"span {start} to {end} ({kind})"
    if not 0 <= start < end <= len(words.text):
        raise RowError(f"{shown} lies outside of the text, which has {len(words.text)} characters")
    first = bisect.bisect_right(words.places, start, key=lambda place: place[1])
    last = bisect.bisect_left(words.places, end, key=lambda place: place[0])
    if first >= last:
        raise RowError(f"{shown} holds no word: remove it")
    if words.place(first, last) != (start, end) and not reading.widen:
        raise RowError(
            f"{shown}, '{words.text[start:end]}', does not begin and end with words ('{words.between(first, last)}'): mend it, "
            "or let such spans grow to whole words (task.borders: widen)"
        )
    return Span(first, last, reading.names.get(kind, kind))


def listed(value: Any) -> list[Any]:
    """Returns the label that a cell holds: tags, in a list or with spaces between them, or spans.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"holds {value!r:.60}, which is neither a list of tags nor of spans [start, end, type]")
    if all(isinstance(tag, str) for tag in value) or all(type(tag) is int for tag in value):
        return [str(tag) for tag in value]
    return [_span(span) for span in value]


START, END, TYPE = ("start", "start_offset", "begin"), ("end", "end_offset"), ("label", "labels", "type", "tag", "entity_group")
"""Keys of a span that is an object."""


def _span(span: Any) -> list[Any]:
    if isinstance(span, dict):
        span = [next((span[key] for key in keys if key in span), None) for keys in (START, END, TYPE)]
    if isinstance(span, (list, tuple)) and len(span) == 3:
        start, end, kind = span
        if isinstance(kind, (list, tuple)) and len(kind) == 1:
            kind = kind[0]
        whole = all(isinstance(place, int) and not isinstance(place, bool) for place in (start, end))
        if whole and isinstance(kind, str) and kind.strip() and kind != OUTSIDE:
            return [start, end, kind]
    raise ValueError(f"holds the span {span!r:.80}, which is not [start, end, type] with whole numbers and one type")


def types_of(label: Any, names: dict[str, str]) -> list[str]:
    """Returns the types of the entities that a label marks; of tags those of all that are some of a scheme's."""
    if not are_tags(label):
        return [names.get(span[2], span[2]) for span in label]
    return [parse(named_tag(tag, names))[1] for tag in label if named_tag(tag, names) != OUTSIDE]
