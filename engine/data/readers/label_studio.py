"""Label Studio's JSON exports of tasks in which spans of a text are labelled: the full one and JSON-MIN."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.data.readers.base import Head, Row
from engine.data.readers.json_array import JsonArray

SPANS = ("labels", "hypertextlabels")
"""Types of results that are labelled spans."""


class LabelStudio(JsonArray):
    """A task a row: the values of its data, and `label`, spans of the newest annotation that was not cancelled.

    Tasks without one have no `label`.
    """

    NAME = "label_studio"

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether the first object has annotations, or spans in JSON-MIN's form."""
        if not super().accepts(head):
            return False
        text = "".join(head.lines)
        try:
            first, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
        except ValueError:
            first = {}
        return isinstance(first, dict) and (_is_full(first) or _is_small(first))

    @property
    def describe(self) -> str:
        """The layout in words."""
        return f"Label Studio's export, {self.head.encoded}"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row)."""
        for line, task in super().rows(lines):
            yield line, self._full(line, task) if _is_full(task) else self._small(line, task)

    def _full(self, line: int, task: Row) -> Row:
        row = {"id": task.get("id"), **task["data"]}
        done = [each for each in task["annotations"] if isinstance(each, dict) and not each.get("was_cancelled")]
        if not done:
            return row
        newest = max(done, key=lambda each: str(each.get("updated_at") or each.get("created_at") or ""))
        results = [result for result in newest.get("result") or [] if result.get("type") in SPANS]
        return {**row, "label": [self._span(line, result.get("value"), result.get("type", SPANS[0])) for result in results]}

    def _small(self, line: int, task: Row) -> Row:
        key = next((name for name, value in task.items() if _are_values(value)), "label")
        rest = {name: value for name, value in task.items() if name != key}
        return {**rest, "label": [self._span(line, value, SPANS[0]) for value in task.get(key) or []]}

    def _span(self, line: int, value: Any, kind: str) -> list[Any]:
        labels = value.get(kind, value.get(SPANS[0])) if isinstance(value, dict) else None
        if not isinstance(labels, list) or len(labels) != 1:
            raise self.broken(line, f"a span has the labels {labels}: a word gets one tag, so that a span needs one label")
        start, end = (value.get("globalOffsets") or value).get("start"), (value.get("globalOffsets") or value).get("end")
        if type(start) is not int or type(end) is not int:
            raise self.broken(line, f"the span '{labels[0]}' has no whole numbers as start and end: export texts, not HTML")
        return [start, end, labels[0]]


def _is_full(task: Any) -> bool:
    return isinstance(task.get("data"), dict) and isinstance(task.get("annotations"), list)


def _are_values(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(each, dict) and {"start", "end", "labels"} <= each.keys() for each in value)


def _is_small(task: Row) -> bool:
    return any(map(_are_values, task.values()))
