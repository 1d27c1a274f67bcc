"""Parquet, read batch by batch through pyarrow, which comes with `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.data.readers.base import Layout, Row
from engine.errors import UserError

BATCH = 1024
"""Rows in memory at a time."""
EXTRA = "pip install 'bothways[data]' (the package datasets)"


class Parquet(Layout):
    """Columns in a binary file; where others have lines it has rows, counted from 1."""

    NAME = "parquet"
    EXTENSIONS = (".parquet", ".pq")
    TEXT = False
    OPTIONS = ()

    @property
    def describe(self) -> str:
        """The layout in words."""
        return "Parquet"

    def rows(self, lines: int | None = None) -> Iterator[tuple[int, Row]]:
        """Yields (row number, row); numbers of classes become their names where the file tells them."""
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(f"{self.path}: Parquet needs an extra: {EXTRA}") from None
        number = 0
        try:
            with ParquetFile(self.path) as file:
                names = class_names(file.schema_arrow.metadata or {})
                columns = file.schema_arrow.names
                twice = next((name for name in columns if columns.count(name) > 1), None)
                if twice is not None:
                    raise UserError(f"{self.path}: two columns are called '{twice}', and only one could be read: rename one")
                for batch in file.iter_batches(BATCH):
                    for row in batch.to_pylist():
                        number += 1
                        if lines is not None and number > lines:
                            return
                        yield number, named(row, names)
        except (ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            where = f":{number + 1}" if number else ""
            raise UserError(f"{self.path}{where}: cannot be read as Parquet: {reason}") from None


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Returns {column: names of its classes} that `datasets` has left in the metadata of a schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        kinds = {column: about.get("feature", about) for column, about in features.items()}  # of lists, what they hold
        return {column: about["names"] for column, about in kinds.items() if about.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def named(row: Row, names: dict[str, list[str]]) -> Row:
    """Replaces the numbers of classes by their names; -1, which means that there is no label, by None."""

    def name(value: Any, classes: list[str]) -> Any:
        if isinstance(value, list):
            return [name(item, classes) for item in value]
        return None if value is None or value < 0 else classes[value]

    return {column: name(value, names[column]) if column in names else value for column, value in row.items()}
