"""Predictions from the command line: texts, lines of standard input, or a file of rows."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from engine.config import is_data
from engine.data.cells import CellError, text_cell
from engine.data.readers import FormatConfig, find_layout
from engine.errors import UserError
from engine.problems import load_section
from engine.terminal import coloured, speaks_unicode, takes_colours
from launch.fields import Fields
from launch.pairs import LAYOUT, pairs
from launch.progress import progress

if TYPE_CHECKING:
    from export.serving.bundle import Bundle

CHUNK = 512
"""Rows predicted at a time."""

Row = dict[str, Any]


def find_bundle(path: Path) -> Path:
    """Returns `path` when it is a bundle.

    Raises:
        UserError: it is none; names the bundle that was probably meant.
    """
    if (path / "manifest.json").is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such bundle (a bundle is the directory of an export stage)")
    inside = sorted(child.parent for child in path.glob("*/manifest.json"))
    hint = f": did you mean {inside[0]}?" if inside else " (no manifest.json): bundles are made by export stages"
    raise UserError(f"{path}: not a bundle{hint}")


def predict(
    bundle: Bundle,
    texts: list[str],
    source: Path | None,
    target: Path | None,
    as_json: bool,
    *,
    fields: str | None = None,
    expected: int | None = None,
    layout: Sequence[str] = (),
    empty: bool = False,
    others: Sequence[str] = (),
) -> None:
    """Predicts every row and writes one line for each.

    Args:
        bundle: an opened bundle.
        texts: what to predict; with none and no `source`, the lines of standard input.
        source: a file of rows in any format that `engine.data.readers` knows; all of it is checked before the first prediction.
        target: where to write, complete or not at all; None: standard output.
        as_json: JSON lines instead of text; a `target` is always written so, unless there are `fields`.
        fields: write a table of these, see `launch.fields.Fields`.
        expected: so many rows the file must have.
        layout: `key=value` of how the file is laid out.
        empty: answer rows with an empty text, too.
        others: `input=text` of the inputs that all of `texts` share, as a context of questions; `input=@file` reads a file.

    Raises:
        UserError: a malformed line or a row without text; names file and line.
    """
    if texts and source:
        raise UserError("give either texts or --input, not both")
    if source is None and (layout or expected is not None):
        raise UserError("--layout and --rows are about a file: give --input")
    if others and source:
        raise UserError("--with is for texts: rows of --input have their own columns")
    if fields and as_json:
        raise UserError("--fields writes a table: leave out --json")
    table = Fields(fields, target) if fields else None
    read = functools.partial(_checked, bundle, source, load_section(FormatConfig, pairs(layout, *LAYOUT), "--layout"), empty)
    first, shared = next(iter(bundle.answers.columns)), {} if source else _shared(bundle, others)
    total = sum(1 for _ in read()) if source else len(texts) or None
    if total == 0:
        raise UserError(f"{source}: no rows")
    if expected is not None and total != expected:
        raise UserError(f"{source}: {total:,} rows, and --rows says {expected:,}: this is another file, or a part of it")
    rows: Iterable[Row] = read() if source else ({first: text, **shared} for text in texts or _lines(sys.stdin))
    # A person who types wants an answer after every line.
    size = 1 if not texts and not source and sys.stdin.isatty() else CHUNK
    numbers = itertools.count()
    with _output(target) as file, progress(total, CHUNK) as advance:
        if table:
            print(table.header, file=file)
        while chunk := list(itertools.islice(rows, size)):
            for row, prediction in zip(chunk, bundle.predict(chunk), strict=True):
                if table:
                    print(table.line(next(numbers), row, prediction), file=file)
                else:
                    print(_line(bundle, row, prediction, as_json or target is not None, file), file=file)
            file.flush()
            advance(len(chunk))


def _shared(bundle: Bundle, others: Sequence[str]) -> Row:
    """Returns the inputs that all texts share; a text is the first input of a bundle.

    Raises:
        UserError: one is missing, or is none of the bundle's.
    """
    first, *rest = bundle.answers.columns
    found: Row = {}
    for name, equals, value in (other.partition("=") for other in others):
        if name not in rest or not equals:
            hint = f": {', '.join(f'--with {each}=…' for each in rest)}" if rest else " (its texts have no other input)"
            raise UserError(f"--with {name}: this bundle reads {', '.join(bundle.answers.columns)}{hint}")
        found[name] = _read(Path(value[1:])) if value.startswith("@") else value
    missing = [name for name in rest if name not in found]
    if missing:
        give = " ".join(f"--with {name}=…" for name in missing)
        raise UserError(
            f"a text is the {first} of this bundle, which also reads {', '.join(missing)}: {give}, or rows by --input"
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 ({error.reason}): convert it to UTF-8") from None


def _lines(stream: IO[str]) -> Iterator[str]:
    """Yields the texts of a stream, one a line, in its own encoding; where that is ASCII, in UTF-8, which contains it.

    Raises:
        UserError: bytes that are no text in it.
    """
    if isinstance(stream, io.TextIOWrapper):
        name = codecs.lookup(stream.encoding).name
        stream.reconfigure(encoding="utf-8" if name == "ascii" else name, errors="strict")
    try:
        yield from (line.strip() for line in stream if line.strip())
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        raise UserError(
            f"standard input: not valid {encoding} ({error.reason}): convert it to {encoding}, as with iconv"
        ) from None


def _checked(bundle: Bundle, source: Path | None, options: FormatConfig, empty: bool) -> Iterator[Row]:
    assert source is not None
    if not source.is_file() and not is_data(source):
        raise UserError(f"{source}: no such file")
    for line, row in find_layout(source, options).rows():
        for key, column in bundle.answers.columns.items():
            found = column if column in row else key
            if bundle.answers.takes_words and isinstance(row.get(found), list) and row[found]:
                continue
            try:
                text = text_cell(row.get(found))
            except CellError as error:
                raise UserError(f"{source}:{line}: column '{found}' {error}") from None
            if text is None and not (empty and found in row):
                more = ": fill it, or answer such rows, too (--empty)" if found in row else ""
                raise UserError(f"{source}:{line}: no text in column '{column}'{more}")
            row[found] = text or ""
        yield row


def _line(bundle: Bundle, row: Row, prediction: dict[str, Any], as_json: bool, file: IO[str]) -> str:
    pieces = None if as_json else bundle.answers.pieces(prediction, row)
    if pieces is not None and takes_colours(file):
        return "".join(piece if kind is None else coloured(piece, kind) for piece, kind in pieces)
    if as_json or pieces is not None:
        return json.dumps({"input": row, **prediction}, ensure_ascii=not speaks_unicode(file), default=str)
    texts = [str(row.get(column, row.get(key))) for key, column in bundle.answers.columns.items()]
    return "\t".join([bundle.answers.line(prediction), *texts])


@contextlib.contextmanager
def _output(target: Path | None) -> Iterator[IO[str]]:
    if target is None:
        yield sys.stdout
        return
    part = target.with_name(target.name + ".tmp")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.rename(target)
    except FileNotFoundError:
        raise UserError(f"{target}: its directory does not exist") from None
    finally:
        part.unlink(missing_ok=True)
