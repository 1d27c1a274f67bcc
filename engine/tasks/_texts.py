"""What tasks on texts and pairs of texts share: examples and batches of one target a row.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.answers import Row
from engine.answers._texts import identity, texts_of
from engine.data.sources import PlacedRow
from engine.errors import UserError
from engine.tasks import Example, Task

if TYPE_CHECKING:
    from engine.tasks import Batch

AT_ONCE = 4096
"""Rows tokenized at a time."""


class TextTask(Task):
    """A task with one target for a text or a pair of texts; its answering half is a `TextAnswers`."""

    missing: ClassVar[float] = -100
    """What stands for the target of a row without one."""

    @abc.abstractmethod
    def target_of(self, row: Row) -> Any:
        """Returns the target of a row as a number, None for a row without one.

        Raises:
            UserError: one that the task cannot take; the place of the row is added.
        """

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenizes rows in order.

        Returns:
            {"input_ids", "token_type_ids", "label", "id"} of each row; "label" is the target.
        """
        examples = []
        for start in range(0, len(rows), AT_ONCE):
            chunk = list(rows[start : start + AT_ONCE])
            for row, encoding in zip(chunk, self.answers.encode(chunk), strict=True):
                self.truncated += bool(encoding.overflowing)
                real = np.flatnonzero(encoding.attention_mask)
                part = slice(real[0], real[-1] + 1)
                examples.append(
                    {
                        "input_ids": encoding.ids[part],
                        "token_type_ids": encoding.type_ids[part],
                        "label": self._placed_target(row),
                        "id": identity(texts_of(row, self.answers.columns)),
                    }
                )
        return examples

    def _placed_target(self, row: Row) -> Any:
        try:
            return self.target_of(row)
        except UserError as error:
            raise UserError(f"{row.path}:{row.line}: {error}" if isinstance(row, PlacedRow) else str(error)) from None

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to the longest: input_ids, attention_mask, token_type_ids (B, L); labels (B,)."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        ids = np.full((len(examples), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = example["input_ids"]
            types[row, :size] = example["token_type_ids"]
            mask[row, :size] = 1
        labels = [self.missing if example["label"] is None else example["label"] for example in examples]
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": np.asarray(labels)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != self.missing).sum())
