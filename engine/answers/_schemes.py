"""Schemes of tags that mark entities word by word: from tags to spans of words and back, and which tag may follow which.

All of them say of a word whether it begins an entity (B), lies inside (I; M), ends one (E; L), is one alone (S; U) or lies
outside (O). Ramshaw and Marcus 1995 (cmp-lg/9505040) begin with I, and with B only behind an entity of the same type: `iob1`.

Shapes: C tags.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

OUTSIDE = "O"
UNTYPED = "span"
"""Type of the entities whose tags name none, as a bare B."""
SCHEMES = ("bio", "iob1", "bioes", "bmes", "bilou")
ENDING = ("bioes", "bmes", "bilou")
"""Those that mark the last word of an entity."""
_TAG = re.compile(r"([BIEMSLU])(?:[-_](.+))?")
_ROLES = {"M": "I", "L": "E", "U": "S"}


class Span(NamedTuple):
    """An entity: words `first` to `end - 1`, or characters, of one type."""

    first: int
    end: int
    type: str


class SchemeError(ValueError):
    """Tags that break their scheme; `index` is that of the word."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


def parse(tag: str) -> tuple[str, str]:
    """Returns (role of the word: B, I, E, S or O, type of its entity).

    Raises:
        ValueError: it is no tag of any scheme.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    found = _TAG.fullmatch(tag)
    if found is None:
        raise ValueError(f"'{tag}' is no tag of a scheme such as B-LOC, I-LOC, O")
    return _ROLES.get(found[1], found[1]), found[2] or UNTYPED


def marks_entities(tags: Iterable[str]) -> bool:
    """Says whether tags mark entities at all; parts of speech, for example, stand for themselves."""
    found = set(tags)
    return bool(found - {OUTSIDE}) and all(tag == OUTSIDE or _TAG.fullmatch(tag) for tag in found)


class Evidence:
    """What speaks for a scheme in the tags that were seen."""

    def __init__(self) -> None:
        self.tags: dict[str, None] = {}
        self.fresh = {"B": 0, "I": 0}
        """How often an entity begins with each where nothing of its type stands before."""

    def add(self, tags: Sequence[str]) -> None:
        """Looks at the tags of a sentence."""
        self.tags |= dict.fromkeys(tags)
        before = ""
        for tag in tags:
            found = _TAG.fullmatch(tag)
            kind = (found[2] or UNTYPED) if found else ""
            if found and found[1] in self.fresh and kind != before:
                self.fresh[found[1]] += 1
            before = kind

    @property
    def scheme(self) -> str | None:
        """The scheme that fits; None where tags mark no entities."""
        if not marks_entities(self.tags):
            return None
        letters = {tag[0] for tag in self.tags if tag != OUTSIDE}
        if "M" in letters:
            return "bmes"
        if letters & {"L", "U"}:
            return "bilou"
        if letters & {"E", "S"}:
            return "bioes"
        return "iob1" if self.fresh["I"] > self.fresh["B"] else "bio"


def spans_of(tags: Sequence[str], scheme: str) -> list[Span]:
    """Returns the entities that tags mark, in order; `first` and `end` count words.

    Raises:
        SchemeError: the tags break the scheme.
    """
    found: list[Span] = []
    first, kind, before = 0, "", OUTSIDE
    for index, tag in enumerate([*tags, OUTSIDE]):
        try:
            role, own = parse(tag)
        except ValueError as error:
            raise SchemeError(index, str(error)) from None
        inside = bool(kind) and own == kind and role in "IE"
        if kind and not inside:
            if scheme in ENDING:
                raise SchemeError(index - 1, f"{before} ends no entity, and {tag if index < len(tags) else 'nothing'} follows")
            found.append(Span(first, index, kind))
            kind = ""
        if role in "IE" and not inside:
            if scheme != "iob1":
                raise SchemeError(index, f"{tag} stands behind {before if index else 'nothing'}: no entity of its type is open")
            role = "B"
        elif role == "B" and scheme == "iob1" and not (found and found[-1].end == index and found[-1].type == own):
            raise SchemeError(index, f"{tag} stands behind no entity of its type, where this scheme begins with I")
        if role == "B":
            first, kind = index, own
        elif role == "S" or (role == "E" and inside):
            found.append(Span(index if role == "S" else first, index + 1, own))
            kind = ""
        before = tag
    return found


def tags_of(spans: Iterable[Span], words: int, scheme: str) -> list[str]:
    """Returns the tags of `words` words, in `bio` or `bioes`."""
    tags = [OUTSIDE] * words
    for first, end, kind in spans:
        for index in range(first, end):
            begins, ends = index == first, index == end - 1 and scheme in ENDING
            role = "S" if begins and ends else "B" if begins else "E" if ends else "I"
            tags[index] = f"{role}-{kind}"
    return tags


def labels_of(types: Iterable[str], scheme: str) -> list[str]:
    """Returns every tag of entities of these types, in `bio` or `bioes`: O, then those of each type."""
    roles = "BIES" if scheme in ENDING else "BI"
    return [OUTSIDE, *(f"{role}-{kind}" for kind in types for role in roles)]


def allowed(labels: Sequence[str], scheme: str | None) -> np.ndarray:
    """Says which tag may follow which, boolean of shape (C + 2, C): everything may where there is no scheme.

    [i, j]: j may follow i; row C: j may be the first of a sentence; row C + 1: j may be the last.
    """
    size = len(labels)
    found = np.ones((size + 2, size), dtype=bool)
    if scheme is None:
        return found
    parsed = [parse(label) for label in labels]
    for column, (role, kind) in enumerate(parsed):
        for row, (before, other) in enumerate([*parsed, (OUTSIDE, "")]):
            opened = before in "BI" and other == kind
            must = scheme in ENDING and before in "BI"
            found[row, column] = opened if role in "IE" else not must
        found[size + 1, column] = scheme not in ENDING or role not in "BI"
    return found
