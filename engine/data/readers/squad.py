"""SQuAD's JSON, 1.1 and 2.0 (arXiv:1606.05250, arXiv:1806.03822): articles of paragraphs with their questions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from engine.answers._quotes import place_of, quotes_of
from engine.data.readers.base import FormatConfig, Head, Row
from engine.data.readers.json_array import JsonArray, Text

_ARTICLES = re.compile(r'"data"\s*:\s*\[')
_VERSION = re.compile(r'"version"\s*:\s*"([^"]{1,20})"')
ARTICLES = "data"
"""Key of the array of articles."""


class Squad(JsonArray):
    """A question a row: `id`, `title`, `question`, `context`, `answers` (`text` and `answer_start`), `is_impossible`.

    An answer that stands beside its place is moved there, and counted; one that does not stand there is refused. What is only
    plausible as an answer is none. A row's line is that on which its article begins.
    """

    NAME = "squad"
    EXTENSIONS = (".json",)

    def __init__(self, head: Head, options: FormatConfig) -> None:
        super().__init__(head, options)
        self.moved = 0

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether it is an object with an array of articles."""
        text = "".join(head.lines)
        return head.first.startswith("{") and _ARTICLES.search(text) is not None and '"paragraphs"' in text

    @property
    def describe(self) -> str:
        """The layout in words, and how many of the answers that were read had to be moved."""
        version = _VERSION.search("".join(self.head.lines))
        moved = f"; {self.moved:,} answers stood a few characters beside answer_start: moved there" if self.moved else ""
        return f"SQuAD's JSON{f' ({version[1]})' if version else ''}, {self.head.encoded}{moved}"

    def begin(self, text: Text, decoder: json.JSONDecoder) -> None:
        """Passes over what stands before the array of articles."""
        sign = text.next()
        while sign in ("{", ","):
            text.skip(1)
            text.next()
            key, end = self.value(text, decoder)
            text.skip(end)
            if text.next() != ":":
                raise self.broken(text.line, "not valid JSON: a colon is missing behind a key")
            text.skip(1)
            sign = text.next()
            if key == ARTICLES:
                return super().begin(text, decoder)
            text.skip(self.value(text, decoder)[1])
            sign = text.next()
        raise self.broken(text.line, f'no SQuAD: an object with articles in "{ARTICLES}" is wanted')

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row); with `lines`, no more rows than that either."""
        self.moved = 0
        yield from itertools.islice(self._questions(lines), lines)

    def _questions(self, lines: int | None) -> Iterator[tuple[int, Row]]:
        for line, article in super().rows(lines):
            title = article.get("title")
            for paragraph in self._list(line, article, "paragraphs", f"article '{title}'"):
                context = paragraph.get("context")
                if not isinstance(context, str):
                    raise self.broken(line, f"article '{title}': a paragraph has no context")
                for asked in self._list(line, paragraph, "qas", f"article '{title}': a paragraph"):
                    yield line, self._row(line, title, context, asked)

    def _list(self, line: int, parent: Row, key: str, whose: str) -> list[Row]:
        found = parent.get(key)
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise self.broken(line, f'{whose} has no list of objects "{key}"')
        return found

    def _row(self, line: int, title: Any, context: str, asked: Row) -> Row:
        impossible = asked.get("is_impossible") is True
        row = {"id": asked.get("id"), "title": title, "question": asked.get("question"), "context": context}
        if not isinstance(row["question"], str):
            raise self.broken(line, f"question {row['id']}: has no text (question)")
        answers = [] if impossible else asked.get("answers")
        if answers is not None:
            answers = self._answers(line, row, answers)
        return {**row, "answers": answers, "is_impossible": impossible}

    def _answers(self, line: int, row: Row, answers: Any) -> list[Row]:
        found = []
        try:
            for quote in quotes_of(answers):
                place = place_of(quote, row["context"])
                self.moved += quote.start not in (None, place.start)
                found.append({"text": quote.text, "answer_start": place.start})
        except ValueError as error:
            raise self.broken(line, f"question {row['id']}: {error}") from None
        return found
