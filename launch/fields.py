"""Answers as a table: chosen fields of answers and rows, tab- or comma-separated, as competitions and spreadsheets take them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from engine.errors import UserError, did_you_mean

NUMBER = "#"
"""Stands for the number of the row, from 0."""


class Fields:
    """What is written of each row.

    Args:
        spec: `index,prediction=label`: a column of the table for each comma; behind `=` what it holds: a field of the answer
            (`label`, `values.score`), else a column of the row, or `#`. Without `=` both have one name.
        target: a name that ends in `.csv` makes commas, else there are tabs.

    Raises:
        UserError: a field without a name, or one that comes twice.
    """

    def __init__(self, spec: str, target: Path | None) -> None:
        pairs = [part.strip().partition("=") for part in spec.split(",")]
        self.sources = {name.strip(): (source if equals else name).strip() for name, equals, source in pairs}
        if len(self.sources) < len(pairs) or not all(name and source for name, source in self.sources.items()):
            raise UserError(f"--fields {spec}: write names that differ, as in index,prediction=label")
        self.commas = target is not None and target.suffix.lower() == ".csv"

    @property
    def header(self) -> str:
        """The first line."""
        return self._line(list(self.sources))

    def line(self, number: int, row: dict[str, Any], answer: dict[str, Any]) -> str:
        """Returns the line of a row.

        Raises:
            UserError: neither the answer nor the row has a field.
        """
        return self._line([_text(number if source == NUMBER else _find(source, answer, row)) for source in self.sources.values()])

    def _line(self, cells: list[str]) -> str:
        if not self.commas:
            return "\t".join(" ".join(cell.splitlines()).replace("\t", " ") for cell in cells)
        written = io.StringIO()
        csv.writer(written, lineterminator="").writerow(cells)
        return written.getvalue()


def _find(source: str, answer: dict[str, Any], row: dict[str, Any]) -> Any:
    """Returns a field of the answer, by a dotted key, or else a column of the row."""
    known = _flat(answer)
    if source in known:
        return known[source]
    if source in row:
        return row[source]
    names = [*known, *map(str, row), NUMBER]
    raise UserError(
        f"--fields: '{source}' is no field of the answer ({', '.join(known)}) and no column{did_you_mean(source, names)}"
    )


def _flat(answer: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Returns {dotted key: value}, those that hold others among them."""
    found = {f"{where}{key}": value for key, value in answer.items()}
    inner = [(key, value) for key, value in found.items() if isinstance(value, dict)]
    return found | {name: value for key, nested in inner for name, value in _flat(nested, f"{key}.").items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else "" if value is None else str(value)
