"""What tasks share that tag the words of a text: their section, and what it says of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from engine.answers import Row
from engine.answers._marks import Reading, are_tags, entities_of, listed, named_tag, tags_as_named, types_of, words_of
from engine.answers._schemes import Evidence, labels_of, marks_entities
from engine.data.cells import Cell, CellError, text_cell
from engine.data.sources import placed
from engine.errors import UserError
from engine.tasks import TaskConfig
from engine.tasks._texts import cell_of, file_of, keys_as_text


def words_cell(value: Any) -> Any:
    """Returns a text, or a list of words as it is."""
    if not isinstance(value, (list, tuple)):
        return text_cell(value)
    text_cell(value)  # refuses what are no words
    if any(not word.strip() for word in value):
        raise CellError("holds a word without a character: leave it out, with its tag")
    return list(value) or None


class TagsConfig(TaskConfig):
    """Base of the sections of tasks that tag words."""

    text: str = "text"
    """Column of the text, or of a list of its words."""
    label: str = "label"
    """Column of the truth: a list of tags, one for each word, or of spans [start, end, type] of characters."""
    names: dict[str, str] = {}
    """Names to show instead of the file's tags or types, as in {PER: person}, or {"0": O, "1": B-PER} where tags are numbers."""
    crf: bool = False
    """Learn which tag follows which, too (a conditional random field), and take the best sequence of a sentence's tags."""
    scheme: Literal["auto", "bio", "iob1", "bioes", "bmes", "bilou", "none"] = "auto"
    """How the tags of the data mark entities; `auto`: seen in the training rows; `none`: they mark none, as parts of speech."""
    learns: Literal["bio", "bioes"] = "bio"
    """The tags that the model gives: beginning and inside, or also the end, and single words (more tags, more to learn)."""
    stride: int | None = Field(None, ge=0)
    """Tokens that neighbouring windows of a long row share; None: a quarter of max_length."""
    borders: Literal["refuse", "widen"] = "refuse"
    """A span that does not begin and end with words: name the first one and stop, or let them grow to whole words."""
    overlaps: Literal["refuse", "longest"] = "refuse"
    """Spans that share a word, of which only one can be learnt: name the first two and stop, or take the longest."""
    unread: Literal["refuse", "skip"] = "refuse"
    """A given word, or one of an entity, of which the tokenizer makes nothing (signs of format alone): name the first one and
    stop, or learn nothing from it."""

    _names = field_validator("names", mode="before")(lambda value: keys_as_text(value))

    @property
    def columns(self) -> dict[str, Cell]:
        return {self.text: words_cell, self.label: cell_of(listed)}

    def unlabelled(self, text: str) -> Row:
        return {self.text: text}

    def classes_of(self, row: Row) -> list[str]:
        label = row.get(self.label) or []
        if are_tags(label) and (self.scheme == "none" or not marks_entities(self.called(label))):
            return sorted(set(self.called(label)))
        return labels_of(sorted(set(types_of(label, self.names))), self.learns)

    def called(self, tags: Sequence[str]) -> list[str]:
        """Returns tags by their new names."""
        return [named_tag(tag, self.names) for tag in tags]

    def class_name(self, name: str) -> str:
        return named_tag(name, self.names)

    def source_of(self, rows: Sequence[Row]) -> str | None:
        """Returns the scheme of the tags of rows; None where they mark no entities, `bio` where rows hold spans alone.

        Raises:
            UserError: tags that are numbers without names, or that mark no entities where spans do.
        """
        evidence, spans = Evidence(), False
        for row in rows:
            label = row[self.label]
            if are_tags(label):
                evidence.add(self.called(label))
            spans = spans or bool(label and not are_tags(label))
        column = f"{file_of(rows)}column '{self.label}'"
        if evidence.tags and all(tag.isdigit() for tag in evidence.tags):
            raise UserError(f"{column} holds numbers for tags: name them (task.names: {{0: O, 1: …}})")
        found = {"auto": evidence.scheme, "none": None}.get(self.scheme, self.scheme)
        if spans and evidence.tags and found is None:
            raise UserError(f"{column} holds spans in some rows, and tags that mark none in others")
        return "bio" if spans and not evidence.tags else found

    def check_length(self, max_length: int) -> None:
        if self.stride is not None and self.stride >= max_length:
            raise UserError(f"task.stride={self.stride}: windows of max_length={max_length} tokens cannot share as many")

    def check_metric(self, marks: bool) -> None:
        """Raises UserError when the metric is none of tags that mark entities, or of such that mark none."""

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at the truth of the training rows.

        Raises:
            UserError: tags that break their scheme, spans that are not at words; names file and line of the first.
        """
        source = self.source_of(rows)
        if source is not None or complete:
            self.check_metric(source is not None)
        for row in rows:
            label = row[self.label]
            with placed(row):
                words = words_of(row, self.text, self.label)
                if source is None:
                    tags_as_named(label, words, self.names)
                else:
                    entities_of(label, words, Reading(source, self.names, self.borders == "widen", self.overlaps == "longest"))
