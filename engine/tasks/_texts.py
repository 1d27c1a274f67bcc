"""What tasks on texts and pairs of texts share: columns, examples and batches.

Shapes: B rows, L tokens, C numbers of a row.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import field_validator

from engine.answers import Row
from engine.answers._texts import NO_TOKEN, OUTPUT, identity, texts_of
from engine.data.cells import Cell, CellError, text_cell
from engine.data.sources import PlacedRow, placed
from engine.errors import UserError, did_you_mean
from engine.models.facts import listed, named, names_hint
from engine.tasks import Example, Facts, Task, TaskConfig

if TYPE_CHECKING:
    import torch

    from engine.tasks import Batch

AT_ONCE = 4096
"""Rows tokenized at a time."""


class TextConfig(TaskConfig):
    """Base of the sections of tasks on texts."""

    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text of a pair (entailment, paraphrase, similarity)."""

    @property
    def truths(self) -> dict[str, Cell]:
        """The columns of the truth, and what is made of their cells."""
        raise NotImplementedError

    @property
    def columns(self) -> dict[str, Cell]:
        """The columns that every row must fill, and what is made of their cells."""
        pair = {self.text_pair: text_cell} if self.text_pair else {}
        return {self.text: text_cell, **pair, **self.truths}

    def unlabelled(self, text: str) -> Row:
        return super().unlabelled(text) if self.text_pair else {self.text: text}


class NamedConfig(TextConfig):
    """Base of those whose rows have classes."""

    names: dict[str, str] = {}
    """Names to show instead of the file's labels, as in {"0": negative, "1": positive}, and instead of those of a model that it
    meets, as in {LABEL_0: negative, LABEL_1: positive}."""

    _names = field_validator("names", mode="before")(lambda value: keys_as_text(value))

    def check_names(self, labels: Collection[str], where: str, complete: bool) -> None:
        """Raises UserError for a name of a label that the training rows do not have.

        Args:
            labels: of the rows, as the file has them.
            where: begins the message, as in "rows.csv: ".
            complete: no others will follow.
        """
        called = {self.names.get(label, label) for label in labels}
        # {LABEL_0: negative} names the class of a model: a label is then called so, too.
        unused = next((label for label, name in self.names.items() if label not in labels and name not in called), None)
        if complete and unused is not None:
            hint = did_you_mean(unused, sorted(labels))
            raise UserError(f"{where}task.names: '{unused}' is no label of column '{', '.join(self.truths)}'{hint}")

    def class_name(self, name: str) -> str:
        return name if name in self.names.values() else self.names.get(name, name)


def keys_as_text(value: Any) -> Any:
    """Returns a mapping whose keys are text, as the labels of a file are: YAML reads `1:` as a number."""
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


def file_of(rows: Sequence[Row]) -> str:
    """Returns how a message begins that is about the file of some rows, as in "rows.csv: "; "" where they are of none."""
    return next((f"{row.path}: " for row in rows if isinstance(row, PlacedRow)), "")


def cell_of(read: Callable[[Any], Any]) -> Cell:
    """Returns what is made of a cell by a function that raises ValueError; None stays None."""

    def cell(value: Any) -> Any:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        try:
            return read(value)
        except ValueError as error:
            raise CellError(str(error)) from None

    return cell


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
                with placed(row):
                    if not len(real):
                        raise UserError(NO_TOKEN)
                    target = self.target_of(row)
                part = slice(real[0], real[-1] + 1)
                examples.append(
                    {
                        "input_ids": encoding.ids[part],
                        "token_type_ids": encoding.type_ids[part],
                        "label": target,
                        "id": identity(texts_of(row, self.answers.columns)),
                    }
                )
        return examples

    def collate(self, examples: list[Example]) -> Batch:
        """Pads examples to the longest: input_ids, attention_mask, token_type_ids (B, L); labels (B,)."""
        import torch

        arrays = self.padded(examples) | self.truths([example["label"] for example in examples])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def padded(self, examples: list[Example]) -> dict[str, np.ndarray]:
        """Returns the inputs of a batch, padded to the longest: input_ids, attention_mask, token_type_ids (B, L)."""
        length = max(len(example["input_ids"]) for example in examples)
        ids = np.full((len(examples), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = example["input_ids"]
            types[row, :size] = example["token_type_ids"]
            mask[row, :size] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def truths(self, found: list[Any]) -> dict[str, np.ndarray]:
        """Returns what a batch holds of the targets of its rows: `labels` (B,), `missing` for a row without one."""
        return {"labels": np.asarray([self.missing if target is None else target for target in found])}

    def count(self, batch: Batch) -> float:
        return int((batch["labels"] != self.missing).sum())


class NumbersTask(TextTask):
    """A task with C targets for a text or a pair of texts, and a head that gives as many numbers."""

    head = "AutoModelForSequenceClassification"
    outputs = [OUTPUT]

    def truths(self, found: list[list[float] | None]) -> dict[str, np.ndarray]:
        """Returns `labels` of B rows, float32 of shape (B, C), and `weights` (B,): 1, or 0 for a row without targets."""
        size = next((len(target) for target in found if target is not None), 1)
        labels_BC = np.array([[0.0] * size if target is None else target for target in found], dtype=np.float32)
        return {"labels": labels_BC, "weights": np.array([target is not None for target in found], dtype=np.float32)}

    def count(self, batch: Batch) -> float:
        return float(batch["weights"].sum())

    def named(self, output: Any) -> Batch:
        """Returns what the head gives, shape (B, C), float32."""
        return {OUTPUT: output.logits.float()}


def weighted(losses_B: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (sum, count) of the losses of rows: the weight of a row enters both, so that the mean is the weighted mean."""
    weights_B = batch["weights"]
    return (weights_B * losses_B).sum(), weights_B.sum()


def labels_as_settings(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the entries of a model's configuration that name its classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def facts_in_order(facts: Facts, own: list[str]) -> Facts:
    """Returns the facts with the labels in the order of a model's own classes, where they are the same ones."""
    return {**facts, "labels": own} if sorted(own) == sorted(facts["labels"]) else facts


def unknown(labels: list[str], label: str) -> str:
    """Returns why a label cannot be taken."""
    if named(labels):
        return f"is not among the training labels{did_you_mean(label, labels)}"
    return (
        f"is none of the model's classes, which have no names ({listed(labels)}): say which is which in {names_hint(labels, [])}"
    )
