"""Train, validation and test rows: separate files, or shares of one file by a hash of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from engine.config import Fraction, Recipe, Strict
from engine.data.cells import Cell
from engine.data.readers import Row
from engine.data.sources import SHOWN, Source, SourceConfig, SourceRows, share_of
from engine.errors import UserError


def _share_or_source(value: Any) -> Any:
    """A number or percentage is a share of `train`; anything else names a file."""
    if isinstance(value, list) or (isinstance(value, str) and not value.strip().endswith("%")):
        return {"path": value}
    return value


Part = Annotated[SourceConfig | Fraction | None, BeforeValidator(_share_or_source)]


class DataConfig(Strict):
    """Where the rows of a stage come from."""

    train: Source
    validation: Part = 0.1
    """A file, or the share of `train` that is held out by a hash of its text (equal texts stay together)."""
    test: Part = None
    """A file, or a share of `train`; evaluated once, after training."""

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> DataConfig:
        shares = [part for part in (self.validation, self.test) if isinstance(part, float)]
        if sum(shares) >= 1:
            raise ValueError(f"validation and test take {sum(shares):.0%} of train and leave nothing to train on: lower them")
        return self


class Splits(dict[str, list[Row]]):
    """{"train": rows, "validation": rows, "test": rows}; absent splits are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        """What is to be said about the files and the splits, a fact a line."""


def load_splits(
    data: DataConfig,
    recipe: Recipe,
    key: str,
    columns: Mapping[str, Cell],
    label_of: Callable[[Row], Any] | None = None,
) -> Splits:
    """Reads every split.

    Args:
        data: the files and shares.
        recipe: finds the files.
        key: the column whose hash decides a row's split.
        columns: the columns that every row must fill, and what is made of their cells.
        label_of: the class of a row, where there are classes: shares then leave each of them a row to train on.

    Raises:
        UserError: bad file or row (file and line), or a split without rows.
    """
    splits = Splits()
    for name in parts_of(data):
        splits[name] = []
    for name, row in iter_splits(data, recipe, key, columns, splits.notes):
        splits[name].append(row)
    shares = [name for name, part in parts_of(data).items() if not isinstance(part, SourceConfig)]
    if shares and label_of:
        _keep_classes(splits, shares, key, label_of)
    for name, part_rows in splits.items():
        if not part_rows:
            raise UserError(f"{data.train.shown}: the {name} split is empty: give more rows or another share")
    return splits


def parts_of(data: DataConfig) -> dict[str, SourceConfig | float]:
    """Returns {name of a split: its files, or its share of `train`}, as they are read: the training rows last."""
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    return {name: part for name, part in parts.items() if part}


def iter_splits(
    data: DataConfig, recipe: Recipe, key: str, columns: Mapping[str, Cell], notes: list[str]
) -> Iterator[tuple[str, Row]]:
    """Yields (name of its split, row) of every row, one in memory at a time; `notes` gets what is to be said, see load_splits."""
    shares: list[tuple[str, float, float]] = []
    low = 0.0
    for split, part in parts_of(data).items():
        if not isinstance(part, SourceConfig):
            shares.append((split, low, low + part))
            low += part
            continue
        rows = SourceRows(part, recipe, columns)
        cut = shares if split == "train" else []
        for row in rows:
            share = share_of(str(row[key])) if cut else 1.0
            yield next((name for name, low, high in cut if low <= share < high), split), row
        notes += [note for note in rows.describe if note not in notes]


def _keep_classes(splits: Splits, held_out: list[str], key: str, label_of: Callable[[Row], Any]) -> None:
    """Gives every class that the hash has held out as a whole a row to train on: all rows of one of its texts.

    Of several texts it is the one with the largest hash, the last that a smaller share would hold out.
    """
    trained = {label_of(row) for row in splits["train"]}
    lost: dict[Any, str] = {}
    for name in held_out:
        for row in splits[name]:
            label, text = label_of(row), str(row[key])
            if label not in trained and (label not in lost or share_of(text) > share_of(lost[label])):
                lost[label] = text
    if not lost:
        return
    moved = set(lost.values())
    for name in held_out:
        splits["train"] += [row for row in splits[name] if str(row[key]) in moved]
        splits[name] = [row for row in splits[name] if str(row[key]) not in moved]
    shown = ", ".join(sorted(str(label) for label in lost)[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
    splits.notes.append(f"{len(lost)} classes of which all rows would have been held out got one text to train on: {shown}")
