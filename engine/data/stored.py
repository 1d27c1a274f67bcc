"""Rows and encoded rows on disk: written once, then read in place, so that a rank's memory does not grow with the data.

A store is a directory, complete or absent. Records of it are found by their number without reading those before.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from engine.data.readers import Row
from engine.data.sources import PlacedRow

Example = dict[str, Any]
"""An encoded row; holds at least `input_ids`."""
END, BOTH = struct.Struct("<q"), struct.Struct("<qq")
PIECE = 256
"""Records read at a time by who reads them all."""
_rows = json.JSONEncoder(ensure_ascii=False, default=str).encode
_decode = json.JSONDecoder().decode
LENGTHS = "input_ids"
"""The column whose length is that of the example."""


class Records:
    """Byte strings one after the other in `<name>.bin`, the end of each (int64, little-endian) in `<name>.ends`.

    They are read at their place, not mapped: mapped pages would count as memory of every rank that has touched them.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.ends = (directory / f"{name}.ends").open("rb", buffering=0)
        self.data = (directory / f"{name}.bin").open("rb", buffering=0)
        self.count = os.fstat(self.ends.fileno()).st_size // END.size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> bytes:
        number = range(self.count)[number]
        if number:
            start, end = BOTH.unpack(os.pread(self.ends.fileno(), BOTH.size, END.size * (number - 1)))
        else:
            start, (end,) = 0, END.unpack(os.pread(self.ends.fileno(), END.size, 0))
        return os.pread(self.data.fileno(), end - start, start)

    def __iter__(self) -> Iterator[bytes]:
        """Yields every record, many read at a time."""
        start = 0
        for first in range(0, self.count, PIECE):
            ends = [end for (end,) in END.iter_unpack(os.pread(self.ends.fileno(), PIECE * END.size, first * END.size))]
            begin, piece = start, os.pread(self.data.fileno(), ends[-1] - start, start)
            for end in ends:
                yield piece[start - begin : end - begin]
                start = end


class RecordWriter:
    """Appends to the files of `Records`."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.data = (directory / f"{name}.bin").open("wb")
        self.ends = (directory / f"{name}.ends").open("wb")
        self.end = 0

    def add(self, record: bytes) -> None:
        """Appends one record."""
        self.end += len(record)
        self.data.write(record)
        self.ends.write(END.pack(self.end))

    def close(self) -> None:
        """Writes what is left."""
        self.data.close()
        self.ends.close()


class StoredRows(Sequence[Row]):
    """The rows of a split as JSON, with the place of each in its file."""

    def __init__(self, directory: Path) -> None:
        self.records = Records(directory, "rows")
        self.paths = [Path(path) for path in json.loads((directory / "paths.json").read_text())]

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        return self._row(self.records[number])

    def __iter__(self) -> Iterator[Row]:
        """Yields every row, reading ahead."""
        return map(self._row, self.records)

    def _row(self, record: bytes) -> Row:
        path, line, row = _decode(record.decode())
        return row if path is None else PlacedRow(row, self.paths[path], line)


class RowWriter:
    """Appends rows to a split that is read as `StoredRows` after `close`; one that is already there is forgotten."""

    def __init__(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # whoever has it open still reads it
        self.directory = directory
        self.records = RecordWriter(directory, "rows")
        self.paths: dict[Path, int] = {}

    def append(self, row: Row) -> None:
        """Appends one row; values that JSON does not have become text."""
        path, line = None, 0
        if isinstance(row, PlacedRow):
            path, line = self.paths.setdefault(row.path, len(self.paths)), row.line
        self.records.add(_rows([path, line, row]).encode())

    def close(self) -> StoredRows:
        """Returns what was written."""
        self.records.close()
        (self.directory / "paths.json").write_text(json.dumps([str(path) for path in self.paths]))
        return StoredRows(self.directory)


class StoredExamples(Sequence[Example]):
    """Encoded rows: a column of whole numbers a row is an int32 array, everything else is what it was."""

    def __init__(self, directory: Path) -> None:
        about = json.loads((directory / "examples.json").read_text())
        self.order: list[str] = about["columns"]
        self.arrays = {name: Records(directory, f"column_{number}") for number, name in enumerate(about["arrays"])}
        self.rest = Records(directory, "rest")
        self.lengths = np.load(directory / "lengths.npy", mmap_mode="r")
        """Tokens of each example, int32, shape (N,)."""

    def __len__(self) -> int:
        return len(self.rest)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        found = _decode(self.rest[number].decode())
        found |= {name: np.frombuffer(records[number], dtype=np.int32) for name, records in self.arrays.items()}
        return {name: found[name] for name in self.order}


def write_examples(examples: Iterable[Example], directory: Path) -> StoredExamples:
    """Writes encoded rows; which columns are arrays is decided by the first row, and holds for all.

    Raises:
        ValueError: a later row has other columns.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lengths, rest = array("i"), RecordWriter(directory, "rest")
    order: list[str] = []
    arrays: dict[str, RecordWriter] = {}
    for example in examples:
        if not order:
            order = list(example)
            names = [name for name, value in example.items() if _whole_numbers(value)]
            arrays = {name: RecordWriter(directory, f"column_{number}") for number, name in enumerate(names)}
        if list(example) != order:
            raise ValueError(f"an example has the columns {list(example)}, the first one {order}")
        for name, writer in arrays.items():
            try:
                writer.add(array("i", example[name]).tobytes())
            except TypeError:
                raise ValueError(f"column '{name}' of an example holds no whole numbers, that of the first one does") from None
        rest.add(_examples({name: value for name, value in example.items() if name not in arrays}).encode())
        lengths.append(len(example[LENGTHS]))
    for writer in (rest, *arrays.values()):
        writer.close()
    np.save(directory / "lengths.npy", np.asarray(lengths, dtype=np.int32))
    (directory / "examples.json").write_text(json.dumps({"columns": order, "arrays": list(arrays)}))
    return StoredExamples(directory)


def _plain(value: Any) -> Any:
    """Returns a number or an array of NumPy as Python has it."""
    return value.tolist()


_examples = json.JSONEncoder(default=_plain).encode


def _whole_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, (list, tuple)) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Returns the tokens of each example, shape (N,)."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.asarray([len(example[LENGTHS]) for example in examples])


def in_chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yields the rows in lists of at most `size`."""
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, size)):
        yield chunk
