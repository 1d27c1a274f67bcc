"""Columns of words and tags as the shared tasks of CoNLL have them: a word a line, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from engine.answers._schemes import OUTSIDE, Evidence, marks_entities
from engine.data.readers.base import FormatConfig, Head, Layout, Row

BORDER = "-DOCSTART-"
"""First cell of a line that stands between documents (CoNLL-2003)."""
UNIVERSAL = ("id", "text", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U (universaldependencies.org/format.html); the form is called `text`."""
_PLAIN_WORD = re.compile(r"\d+")
"""In CoNLL-U, the id of a line that is a word; `1-2` and `1.1` are none."""


class Conll(Layout):
    """A sentence a row: a list for each column.

    The first column is called `text`, the last one `label`, those between them 2, 3, …; `header:` names them otherwise. Where
    documents have borders, `document` counts them from 1. Lines that begin with # before a sentence are comments, unless they
    look like a word with its tags.
    """

    NAME = "conll"
    EXTENSIONS = (".conll", ".conllu", ".conll2003", ".iob", ".iob2", ".bio", ".bioes", ".bmes", ".ner", ".txt", ".text", ".tsv")
    OPTIONS = ("encoding", "header")

    def __init__(self, head: Head, options: FormatConfig) -> None:
        super().__init__(head, options)
        self.universal = head.extension == ".conllu"
        self.tab = _tab(head.lines)
        size = next((len(cells) for cells in map(self._cells, head.lines) if len(cells) > 1 and not self._comment(cells)), 2)
        self.columns = self._names(size)

    def _names(self, size: int) -> list[str]:
        given = self.options.header
        if isinstance(given, bool):
            raise self.broken(1, "columns of words have no line with their names: write them, as in header: [text, pos, label]")
        if given is not None:
            if len(given) != size:
                raise self.broken(1, f"header names {len(given)} columns, and lines have {size}")
            return given
        if self.universal and size == len(UNIVERSAL):
            return list(UNIVERSAL)
        return ["text", *(str(number) for number in range(2, size)), "label"]

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether its lines are words with tags: several columns everywhere, and blank lines, or tags that mark entities."""
        if head.extension not in (".txt", ".text", ".tsv"):
            return True
        tab = _tab(head.lines)
        rows = [_cut(line, tab) for line in head.lines]
        words = [cells for cells in rows if len(cells) > 1 and not cells[0].startswith("#")]
        single = any(len(cells) == 1 and cells[0] for cells in rows)
        alike = len(words) > 1 and len({len(cells) for cells in words}) == 1 and not single
        return alike and len(words[0]) <= 12 and any(marks_entities(column) for column in list(zip(*words, strict=True))[1:])

    @property
    def describe(self) -> str:
        """The layout in words, with the scheme of its tags."""
        evidence = Evidence()
        for _, row in self._sentences(self.head.lines if self.head.whole else self.head.lines[:-1]):
            for tags in [row["label"]] if "label" in row else []:
                evidence.add(tags)
        scheme = f", tags in {evidence.scheme}" if evidence.scheme else ""
        columns = f"columns {', '.join(self.columns)}"
        return f"CoNLL with {'tabs' if self.tab else 'spaces'}, {columns}{scheme}, {self.head.encoded}"

    @property
    def hint(self) -> str:
        """What to try when a column is not there."""
        return "; name the columns: header: [text, pos, label]"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number of its first word, row) of every sentence; with `lines`, up to the first that begins behind it."""
        yield from self._sentences(self.text(), lines)

    def _sentences(self, text: Iterable[str], limit: int | None = None) -> Iterator[tuple[int, Row]]:
        words: list[list[str]] = []
        first = document = 0
        for line, content in enumerate(text, 1):
            cells = self._cells(content)
            if not any(cells):
                if words:
                    yield first, self._row(words, document)
                    words = []
                    if limit is not None and first >= limit:
                        return
            elif cells[0] == BORDER:
                document += 1
            elif (words or not self._comment(cells)) and not (self.universal and not _PLAIN_WORD.fullmatch(cells[0])):
                if len(cells) != len(self.columns):
                    raise self.broken(line, f"{len(cells)} columns where there should be {len(self.columns)}")
                if not all(cell.strip() for cell in cells):
                    name = self.columns[next(place for place, cell in enumerate(cells) if not cell.strip())]
                    raise self.broken(line, f"column '{name}' is empty: fill it, or remove the line")
                first = first if words else line
                words.append(cells)
        if words:
            yield first, self._row(words, document)

    def _row(self, words: list[list[str]], document: int) -> Row:
        row: Row = {name: list(cells) for name, cells in zip(self.columns, zip(*words, strict=True), strict=True)}
        return {**row, "document": document} if document else row

    def _cells(self, line: str) -> list[str]:
        return _cut(line, self.tab)

    def _comment(self, cells: list[str]) -> bool:
        if not cells[0].startswith("#"):
            return False
        if self.universal or len(cells) != len(getattr(self, "columns", cells)):
            return True
        return cells[0] == "#" and not (cells[-1] == OUTSIDE or marks_entities(cells[-1:]))


def _tab(lines: Sequence[str]) -> bool:
    """Says whether tabs stand between the columns."""
    return any("\t" in line for line in lines if line.strip() and not line.startswith("#"))


def _cut(line: str, tab: bool) -> list[str]:
    line = line.rstrip("\r\n")
    if not line.strip():
        return [""]
    return line.split("\t") if tab else re.split(r"[ \t]+", line.strip(" \t"))
