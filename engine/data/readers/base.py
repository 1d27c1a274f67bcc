"""What every reader of a format gives: how a file is laid out, in words, and its rows with their line numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from engine.config import Strict
from engine.data.readers.files import TextFile, hidden_damage
from engine.errors import UserError

Row = dict[str, Any]
"""Column name to value."""
FormatName = Literal[
    "jsonl", "json", "csv", "fasttext", "lines", "parquet", "conll", "cluener", "doccano", "label_studio", "squad"
]


class FormatConfig(Strict):
    """How a file is laid out; what is not said is looked up in the file."""

    format: FormatName | None = None
    """`jsonl`, `json` (one array), `csv` (TSV too), `fasttext`, `lines` (a row a line), `parquet`, `conll` (words and tags in
    columns), spans as in `cluener`, `doccano` and `label_studio`, or `squad`; None: by extension and content."""
    encoding: str | None = None
    """Of text files, a name that Python knows, as in `cp1252`; None: UTF-8 where the bytes are UTF-8, else UTF-16 or a guess."""
    delimiter: str | None = None
    """Of `csv`: one character; None: the one of `,` `;` tab `|` that cuts the lines alike."""
    quoting: Literal["doubled", "backslash", "none"] | None = None
    """Of `csv`: a quote inside quotes is doubled (\"\"), follows a backslash, or quotes mean nothing (as in GLUE's TSV files)."""
    header: bool | list[str] | None = None
    """Of `csv`: whether the first line names the columns, or their names where no line does. Unnamed ones are called 1, 2, …
    Of `conll`: names of the columns."""
    bad_lines: Literal["refuse", "drop"] | None = None
    """Of `csv`: lines with another number of cells than the header are refused, or left out and counted; None: refuse."""
    subset: str | None = None
    """Of a hub data set: its configuration, as in `sst2` of `hub:nyu-mll/glue`."""
    split: str | None = None
    """Of a hub data set: which of its splits; None: `train`."""

    @field_validator("delimiter")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = {"\\t": "\t", "tab": "\t"}.get(value or "", value)
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('a delimiter is one character, and no quote: `","`, `";"`, `"\\t"`, `"|"`')
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            "".encode(value or "utf-8")
        except LookupError:
            raise ValueError(f"Python knows no encoding '{value}': one of utf-8, utf-16, cp1252, latin-1, gb18030, …") from None
        return value


@dataclass(frozen=True)
class Head:
    """The beginning of a text file, by which its layout is recognised."""

    path: Path
    extension: str
    """Lower case, without that of the compression: `.csv`."""
    lines: list[str]
    """Its first lines, whole ones only, with their ends."""
    whole: bool
    """These are all."""
    encoding: str
    guessed: bool
    """The encoding follows from no byte order mark and no proof: it only fits best."""

    @property
    def first(self) -> str:
        """The first line that is not blank, without the spaces around it."""
        return next((line.strip() for line in self.lines if line.strip()), "")

    @property
    def encoded(self) -> str:
        """The encoding in words."""
        return f"{self.encoding} (guessed: set encoding to overrule it)" if self.guessed else self.encoding


class Layout(ABC):
    """One file of rows whose layout is known. A subclass is a format; `engine.data.readers.FORMATS` lists them."""

    NAME: ClassVar[str]
    """What `format:` calls it."""
    EXTENSIONS: ClassVar[tuple[str, ...]]
    """Names of files that may have it."""
    TEXT = True
    """It is text: its head is decoded before it is asked whether it accepts a file."""
    OPTIONS: ClassVar[tuple[str, ...]] = ("encoding",)
    """The keys of FormatConfig that mean something to it."""

    def __init__(self, head: Head, options: FormatConfig) -> None:
        self.path, self.head, self.options = head.path, head, options
        self.left_out = 0
        """Lines that were no rows and were passed over, in the last reading."""

    @classmethod
    def accepts(cls, head: Head) -> bool:
        """Says whether a file of one of the EXTENSIONS has this format."""
        return True

    @property
    @abstractmethod
    def describe(self) -> str:
        """The layout in words, for the person whose file it is."""

    @abstractmethod
    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (line number, row) of every row; with `lines`, no further than that line.

        Raises:
            UserError: unreadable file or malformed line; names file and line.
        """

    def text(self) -> TextFile:
        """Opens the file as text."""
        return TextFile(self.path, self.head.encoding)

    def broken(self, line: int, problem: str) -> UserError:
        """Returns what to raise at a line that cannot be read."""
        damaged = hidden_damage(self.path)
        return UserError(f"{self.path}:{line}: {f'cannot be read: {damaged}: fetch it again' if damaged else problem}")

    @property
    def hint(self) -> str:
        """What to try when a column is not there."""
        return ""
