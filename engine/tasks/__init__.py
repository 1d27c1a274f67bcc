"""Fine-tuning tasks, one file each. A task encodes rows, gives the loss as (sum, count) and judges predictions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from engine.config import Strict


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

    @property
    def columns(self) -> list[str]:
        """The columns that every row must fill."""
        return [self.text, *([self.text_pair] if self.text_pair else []), self.label]
