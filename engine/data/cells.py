"""What a task makes of the cells of a column: texts, labels; and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any

from engine.errors import UserError

MAX_NUMBERS = 12
"""More different numbers than these, not all of them whole, are scores and no classes."""
_FRACTION = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class CellError(ValueError):
    """A cell that cannot be used; whoever reads the row adds file and line."""


Cell = Callable[[Any], Any]
"""Returns what is kept of a value of its column, None when the value is missing. Raises CellError."""


def missing(value: Any) -> bool:
    """Says whether a cell holds nothing: null, "", or not a number."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def text_cell(value: Any) -> str | None:
    """Returns a text; a list of words becomes one, with spaces between them."""
    if missing(value):
        return None
    if isinstance(value, dict):
        raise CellError(
            f"holds an object ({', '.join(map(str, value))}), which is no text: write one of its values into a column"
        )
    if isinstance(value, (list, tuple)):
        if not all(isinstance(word, str) for word in value):
            raise CellError("holds a list that is no list of words: write it as text")
        return " ".join(value) or None
    return str(value)


def label_cell(value: Any) -> str | None:
    """Returns the label of a row that has one; `nan` is what a missing one looks like after a detour through text."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise CellError(f"holds {len(value)} labels, and this task gives a row one: keep one of them in the column")
        value = next(iter(value), None)
    if isinstance(value, (dict, list, tuple)):
        raise CellError("holds an object, which is no label: write the label itself into the column")
    if missing(value) or (isinstance(value, str) and value.strip().lower() == "nan"):
        return None
    return str(value)


def refuse_scores(labels: Collection[str], column: str, where: str = "") -> None:
    """Raises UserError when the different labels of a column are numbers on a scale, not names of classes.

    Args:
        where: begins the message, as in "rows.csv: ".
    """
    if len(labels) <= MAX_NUMBERS or not all(_FRACTION.fullmatch(label) for label in labels):
        return
    numbers = sorted(map(float, labels))
    if not all(number.is_integer() for number in numbers):
        raise UserError(
            f"{where}column '{column}' holds {len(numbers)} different numbers ({numbers[0]:g} to {numbers[-1]:g}): scores are "
            "for regression, not for classification; take task.type: regression, or round them to a few classes"
        )
