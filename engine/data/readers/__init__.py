"""Readers of the formats that people have, one a file. The format is looked up in the file, said, and can be named.

A new format is a file here with a subclass of `Layout`, and its line in FORMATS.
"""

from __future__ import annotations

import io
from pathlib import Path

from engine.data.readers.aligned import Aligned
from engine.data.readers.atis import Atis
from engine.data.readers.base import FormatConfig, Head, Layout, Row
from engine.data.readers.cluener import Cluener
from engine.data.readers.conll import Conll
from engine.data.readers.delimited import Delimited
from engine.data.readers.doccano import Doccano
from engine.data.readers.fasttext import FastText
from engine.data.readers.files import ARCHIVES, COMPRESSED, extension_of, find_encoding, read_sample
from engine.data.readers.hub import Hub
from engine.data.readers.json_array import JsonArray
from engine.data.readers.jsonl import JsonLines
from engine.data.readers.label_studio import LabelStudio
from engine.data.readers.lines import Lines
from engine.data.readers.parquet import Parquet
from engine.data.readers.squad import Squad
from engine.errors import UserError

FORMATS: tuple[type[Layout], ...] = (
    LabelStudio,
    JsonArray,
    Squad,
    Cluener,
    Doccano,
    JsonLines,
    Conll,
    Delimited,
    FastText,
    Lines,
    Parquet,
)
"""In the order in which they are asked whether they accept a file of their extensions."""

__all__ = ["FORMATS", "FormatConfig", "Layout", "Row", "find_layout"]


def find_layout(source: Path | str | dict[str, Path], options: FormatConfig | None = None) -> Layout:
    """Returns how a file is to be read.

    Args:
        source: a file, a directory with `seq.in` or that `datasets` has saved, `hub:NAME`, or {column: file} of line-aligned
            files.
        options: what is known already.

    Raises:
        UserError: it cannot be read, or nothing says how; an option that its format does not have.
    """
    options = options or FormatConfig()
    if isinstance(source, dict):
        _refuse_others(Aligned, options, next(iter(source.values())))
        if options.format not in (None, "lines"):
            raise UserError(f"format: {options.format}: files that belong together line by line are plain text: remove it")
        return Aligned({column: read_head(path, options) for column, path in source.items()}, options)
    if isinstance(source, Path) and Atis.lies_in(source):
        _refuse_others(Atis, options, source)
        if options.format is not None:
            raise UserError(f"{source}: format: {options.format}: a directory with seq.in is read as it is: remove it")
        return Atis({column: read_head(path, options) for column, path in Atis.files(source).items()}, options)
    if isinstance(source, str) or source.is_dir():
        _refuse_others(Hub, options, source)
        return Hub(source, options)
    found = _format_of(source, options)
    _refuse_others(found[0], options, source)
    return found[0](found[1], options)


def read_head(path: Path, options: FormatConfig) -> Head:
    """Reads the beginning of a text file."""
    sample, whole = read_sample(path)
    encoding, guessed = (options.encoding, False) if options.encoding else find_encoding(path, sample, whole)
    lines = list(io.StringIO(sample.decode(encoding, errors="replace").removeprefix("\ufeff"), newline=""))
    if not whole and len(lines) > 1:
        lines.pop()
    return Head(path, extension_of(path), lines, whole, encoding, guessed)


def _format_of(path: Path, options: FormatConfig) -> tuple[type[Layout], Head]:
    extension = extension_of(path)
    named = [kind for kind in FORMATS if options.format == kind.NAME]
    fitting = named or [kind for kind in FORMATS if extension in kind.EXTENSIONS]
    if not fitting:
        names = ", ".join(sorted({name for kind in FORMATS for name in kind.EXTENSIONS}))
        unpack = "unpack it" if extension in ARCHIVES else "name it (format: csv, …)"
        known = f"use one of {names}, optionally with {', '.join(COMPRESSED)}"
        raise UserError(f"{path}: unknown format '{extension or path.name}': {unpack}, or {known}")
    if not fitting[0].TEXT:
        return fitting[0], Head(path, extension, [], True, "", False)
    head = read_head(path, options)
    return (named or [kind for kind in fitting if kind.accepts(head)])[0], head


def _refuse_others(kind: type[Layout], options: FormatConfig, source: Path | str) -> None:
    given = [name for name in options.model_dump(exclude_none=True) if name in FormatConfig.model_fields and name != "format"]
    foreign = next((name for name in given if name not in kind.OPTIONS), None)
    if foreign is not None:
        raise UserError(f"{source}: {foreign} means nothing to the format {kind.NAME}: remove it, or name the format (format: …)")
