"""Train, validation and test rows: separate files, or shares of one file by a hash of the text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from engine.config import Fraction, Recipe, Strict
from engine.data.sources import Row, Source, SourceConfig, read_rows, share_of
from engine.errors import UserError


def _share_or_source(value: Any) -> Any:
    """A number or percentage is a share of `train`; anything else names a file."""
    if isinstance(value, str) and not value.strip().endswith("%"):
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


def load_splits(data: DataConfig, recipe: Recipe, key: str, columns: list[str]) -> dict[str, list[Row]]:
    """Reads every split: {"train": rows, "validation": rows, "test": rows}; absent splits are left out.

    Args:
        data: the files and shares.
        recipe: finds the files.
        key: the column whose hash decides a row's split.
        columns: the columns that every row must fill.

    Raises:
        UserError: bad file or row (file and line), or a split without rows.
    """
    rows: dict[str, list[Row]] = {}
    shares: list[tuple[str, float, float]] = []
    low = 0.0
    for name, part in (("test", data.test), ("validation", data.validation)):
        if isinstance(part, SourceConfig):
            rows[name] = list(read_rows(part, recipe, columns))
        elif part:
            rows[name] = []
            shares.append((name, low, low + part))
            low += part
    rows["train"] = []
    for row in read_rows(data.train, recipe, columns):
        share = share_of(str(row[key])) if shares else 1.0
        name = next((name for name, low, high in shares if low <= share < high), "train")
        rows[name].append(row)
    for name, part_rows in rows.items():
        if not part_rows:
            raise UserError(f"{recipe.find_file(data.train.path)}: the {name} split is empty: give more rows or another share")
    return rows
