"""Fine-tuning tasks, one file each. A task encodes rows, gives the loss as (sum, count) and judges predictions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import field_validator

from engine.config import Strict
from engine.data.cells import Cell, label_cell, refuse_scores, text_cell
from engine.errors import UserError, did_you_mean


class ClassificationConfig(Strict):
    """One label for a text, or for a pair of texts."""

    type: Literal["classification"]
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text of a pair (entailment, paraphrase)."""
    label: str = "label"
    """Column of the label."""
    names: dict[str, str] = {}
    """Names to show instead of the file's labels, as in {"0": negative, "1": positive}."""

    @field_validator("names", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return {str(key): name for key, name in value.items()} if isinstance(value, dict) else value

    def label_of(self, row: dict[str, Any]) -> str | None:
        """Returns the name of a row's label, None for an unlabelled row."""
        value = row.get(self.label)
        return None if value is None else self.names.get(str(value), str(value))

    def check_labels(self, labels: Collection[str], complete: bool) -> None:
        """Looks at the labels of the training rows, as the file has them.

        Args:
            complete: no others will follow.

        Raises:
            UserError: numbers that are scores, or `names` for labels that are not there.
        """
        refuse_scores(labels, self.label)
        unused = next((label for label in self.names if label not in labels), None)
        if complete and unused is not None:
            raise UserError(f"task.names: '{unused}' is no label of column '{self.label}'{did_you_mean(unused, sorted(labels))}")

    @property
    def columns(self) -> dict[str, Cell]:
        """The columns that every row must fill, and what is made of their cells."""
        pair = {self.text_pair: text_cell} if self.text_pair else {}
        return {self.text: text_cell, **pair, self.label: label_cell}
