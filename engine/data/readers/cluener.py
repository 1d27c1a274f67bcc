"""CLUENER's JSON lines (arXiv:2001.04351): a text, and for each type the entities with their places."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.data.readers.base import Head, Row
from engine.data.readers.jsonl import JsonLines


class Cluener(JsonLines):
    """`{"text", "label": {type: {entity: [[first, last], …]}}}`, both characters included: column `label` becomes spans."""

    NAME = "cluener"

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether a first line has such a label; lines without an entity do not tell."""
        return any(_holds_places(_parsed(line)) for line in head.lines[:50])

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"CLUENER's JSON lines (last characters included), {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row); `label` is a list of [start, end, type]. An entity that does not stand there is refused."""
        for line, row in super().rows(lines):
            if "label" in row:
                row["label"] = self._spans(line, row)
            yield line, row

    def _spans(self, line: int, row: Row) -> list[list[Any]]:
        text, label = row.get("text"), row["label"]
        if not isinstance(text, str) or not isinstance(label, dict):
            raise self.broken(line, "a row needs a text, and a label of the form {type: {entity: [[first, last]]}}")
        found = []
        for kind, entities in label.items():
            if not isinstance(entities, dict) or not all(map(_are_places, entities.values())):
                raise self.broken(line, f"the entities of '{kind}' have no lists of places [first, last]")
            for entity, (first, last) in ((entity, place) for entity, places in entities.items() for place in places):
                there = text[first : last + 1]
                if there != entity:
                    raise self.broken(line, f"'{entity}' ({kind}) does not stand at {first} to {last}: '{there}' does")
                found.append([first, last + 1, kind])
        return sorted(found)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 2 and all(type(number) is int and number >= 0 for number in place)


def _are_places(places: Any) -> bool:
    return isinstance(places, list) and all(map(_is_place, places))


def _holds_places(row: Any) -> bool:
    label = row.get("label") if isinstance(row, dict) else None
    if not isinstance(label, dict) or not label:
        return False
    return all(isinstance(found, dict) and found and all(map(_are_places, found.values())) for found in label.values())
