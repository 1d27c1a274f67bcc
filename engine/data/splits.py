"""Train, validation and test rows: separate files, or shares of one file by a hash of the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, field_validator, model_validator

from engine.config import Fraction, Recipe, Strict
from engine.data.cells import Cell
from engine.data.readers import Row
from engine.data.sources import SHOWN, PlacedRow, Source, SourceConfig, SourceRows, share_of
from engine.errors import UserError
from engine.judging import require_column


def _share_or_source(value: Any) -> Any:
    """A number or percentage is a share of `train`; anything else names a file."""
    if isinstance(value, list) or (isinstance(value, str) and not value.strip().endswith("%")):
        return {"path": value}
    return value


def _named_sets(value: Any) -> Any:
    """A mapping without `path` names several test sets, as in {matched: a.tsv, mismatched: b.tsv}."""
    if isinstance(value, dict) and value and not any(str(key) in SourceConfig.model_fields for key in value):
        return {
            str(name): source if isinstance(source, SourceConfig) else SourceConfig.model_validate(_share_or_source(source))
            for name, source in value.items()
        }
    return _share_or_source(value)


Part = Annotated[SourceConfig | Fraction | None, BeforeValidator(_share_or_source)]


class DataConfig(Strict):
    """Where the rows of a stage come from."""

    train: Source
    validation: Part = 0.1
    """A file, or the share of `train` that is held out by a hash of its text (equal texts stay together)."""
    test: Annotated[dict[str, SourceConfig] | SourceConfig | Fraction | None, BeforeValidator(_named_sets)] = None
    """A file, or a share of `train`; evaluated once, after training. Or several sets by name, as in {matched: a.tsv, not: b.tsv}:
    all their rows together are the test rows, and each set is judged on its own as well."""
    slices: list[str] = []
    """Columns by whose values the held-out rows are judged apart, as in [product, language]; `length` takes a row's tokens."""

    _listed = field_validator("slices", mode="before")(lambda value: [value] if isinstance(value, str) else value)

    @property
    def sources(self) -> list[SourceConfig]:
        """All files, those of the training rows first."""
        parts = (self.train, self.validation, *(self.test.values() if isinstance(self.test, dict) else [self.test]))
        return [part for part in parts if isinstance(part, SourceConfig)]

    @property
    def cut(self) -> float:
        """Share of the training rows that is held out."""
        return sum(part for part in (self.validation, self.test) if isinstance(part, float))

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> DataConfig:
        if self.cut >= 1:
            raise ValueError(f"validation and test take {self.cut:.0%} of train and leave nothing to train on: lower them")
        return self


class Splits(dict[str, Sequence[Row]]):
    """{"train": rows, "validation": rows, "test": rows}; absent splits are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        """What is to be said about the files and the splits, a fact a line."""
        self.sets: dict[str, int] = {}
        """{name of a test set: its rows}, in the order of the test rows, where there are several."""
        self.slices: list[str] = []
        """Columns by which the held-out rows are judged apart."""


class Sink(Protocol):
    """Takes the rows of one split."""

    def append(self, row: Row) -> None:
        """Takes one row."""

    def close(self) -> Sequence[Row]:
        """Returns all of them."""


class Held(list[Row]):
    """Rows in memory, not more than `limit` of them."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.limit = limit

    def append(self, row: Row) -> None:
        """Takes one row while there is room."""
        if self.limit is None or len(self) < self.limit:
            super().append(row)

    def close(self) -> Sequence[Row]:
        """Returns the rows."""
        return self


def load_splits(
    data: DataConfig,
    recipe: Recipe,
    key: str,
    columns: Mapping[str, Cell],
    classes_of: Callable[[Row], Collection[Any]] = lambda row: (),
    new: Callable[[str], Sink] = lambda name: Held(),
) -> Splits:
    """Reads every split.

    Args:
        data: the files and shares.
        recipe: finds the files.
        key: the column whose hash decides a row's split.
        columns: the columns that every row must fill, and what is made of their cells.
        classes_of: the classes of a row: shares leave each of them a row to train on.
        new: makes what takes the rows of a split of that name, in memory or on disk.

    Raises:
        UserError: bad file or row (file and line), or a split without rows.
    """
    splits = Splits()
    splits.slices = data.slices
    sinks = {name: new(name) for name in parts_of(data)}
    shares = [name for name, part in parts_of(data).items() if isinstance(part, float)]
    trained: set[Any] = set()
    held: dict[Any, str] = {}
    """Label to that of its held-out texts with the largest hash, the first that a smaller share would leave in training."""
    for name, row in iter_splits(data, recipe, key, columns, splits.notes, splits.sets):
        sinks[name].append(row)
        if name == "train":
            trained.update(classes_of(row))
            continue
        for column in data.slices:
            require_column(row, column, f"{row.path}:{row.line}: ")
        if name in shares:
            for label in classes_of(row):
                if label not in held or share_of(str(row[key])) > share_of(held[label]):
                    held[label] = str(row[key])
    lost = {label: text for label, text in held.items() if label not in trained}
    moved = set(lost.values())
    for name in shares if lost else []:
        rows = sinks[name].close()
        sinks[name] = new(name)
        for kept in rows:
            sinks["train" if str(kept[key]) in moved else name].append(kept)
    if lost:
        shown = ", ".join(sorted(map(str, lost))[:SHOWN]) + (", …" if len(lost) > SHOWN else "")
        splits.notes.append(f"{len(lost)} classes of which all rows would have been held out got one text to train on: {shown}")
    for name, sink in sinks.items():
        splits[name] = sink.close()
        if not splits[name]:
            raise UserError(f"{data.train.shown}: the {name} split is empty: give more rows or another share")
    return splits


def parts_of(data: DataConfig) -> dict[str, dict[str, SourceConfig] | float]:
    """Returns {name of a split: its files by name, or its share of `train`}, as they are read: the training rows last."""
    parts = {"test": data.test, "validation": data.validation, "train": data.train}
    return {name: {"": part} if isinstance(part, SourceConfig) else part for name, part in parts.items() if part}


def split_of(data: DataConfig, text: str) -> str:
    """Returns the split to which a text of the training files belongs, by its hash."""
    shares = [(name, part) for name, part in parts_of(data).items() if isinstance(part, float)]
    place, low = share_of(text) if shares else 1.0, 0.0
    for name, share in shares:
        if low <= place < low + share:
            return name
        low += share
    return "train"


def iter_splits(
    data: DataConfig,
    recipe: Recipe,
    key: str,
    columns: Mapping[str, Cell],
    notes: list[str],
    sets: dict[str, int] | None = None,
) -> Iterator[tuple[str, PlacedRow]]:
    """Yields (name of its split, row) of every row, one in memory at a time: see load_splits.

    Args:
        notes: gets what is to be said.
        sets: gets {name: rows} of test sets that have names.
    """
    for split, part in parts_of(data).items():
        for named, source in part.items() if isinstance(part, dict) else ():
            rows = SourceRows(source, recipe, columns)
            for row in rows:
                yield split_of(data, str(row[key])) if split == "train" else split, row
            notes += [note for note in rows.describe if note not in notes]
            if named and sets is not None:
                sets[named] = rows.kept
