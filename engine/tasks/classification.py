"""Text classification, the training half: a softmax over labels on top of the pooled first token.

Shapes: B rows, L tokens, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from engine.answers import Row
from engine.answers.classification import OUTPUT, label_of
from engine.data.cells import Cell, label_cell, refuse_scores, text_cell
from engine.data.sources import PlacedRow
from engine.errors import UserError, did_you_mean
from engine.models.facts import listed, named, names_hint
from engine.tasks import Facts, TaskConfig
from engine.tasks._texts import TextTask

if TYPE_CHECKING:
    import torch

    from engine.tasks import Batch


class Config(TaskConfig):
    """One label for a text, or for a pair of texts."""

    type: Literal["classification"]
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text of a pair (entailment, paraphrase)."""
    label: str = "label"
    """Column of the label."""
    names: dict[str, str] = {}
    """Names to show instead of the file's labels, as in {"0": negative, "1": positive}, and instead of those of a model that it
    meets, as in {LABEL_0: negative, LABEL_1: positive}."""

    @field_validator("names", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        return {str(key): name for key, name in value.items()} if isinstance(value, dict) else value

    @property
    def columns(self) -> dict[str, Cell]:
        """The columns that every row must fill, and what is made of their cells."""
        pair = {self.text_pair: text_cell} if self.text_pair else {}
        return {self.text: text_cell, **pair, self.label: label_cell}

    def class_of(self, row: Row) -> str | None:
        return label_of(row, self.label, self.names)

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at the labels of the training rows, as the file has them.

        Raises:
            UserError: numbers that are scores, or `names` for labels that are not there.
        """
        labels = {str(row[self.label]) for row in rows}
        where = next((f"{row.path}: " for row in rows if isinstance(row, PlacedRow)), "")
        refuse_scores(labels, self.label, where)
        called = {self.names.get(label, label) for label in labels}
        # {LABEL_0: negative} names the class of a model: a label is then called so, too.
        unused = next((label for label, name in self.names.items() if label not in labels and name not in called), None)
        if complete and unused is not None:
            hint = did_you_mean(unused, sorted(labels))
            raise UserError(f"{where}task.names: '{unused}' is no label of column '{self.label}'{hint}")

    def class_name(self, name: str) -> str:
        return name if name in self.names.values() else self.names.get(name, name)

    def unlabelled(self, text: str) -> Row:
        return super().unlabelled(text) if self.text_pair else {self.text: text}


class Task(TextTask):
    """The classification task. Facts: `labels`, class names in the order of their ids."""

    head = "AutoModelForSequenceClassification"
    says = "a classifier"
    outputs = [OUTPUT]

    @classmethod
    def learn(cls, config: Config, rows: Sequence[Row]) -> Facts:
        """Returns the sorted labels of the training rows.

        Raises:
            UserError: fewer than two, numbers that are scores, or `names` for labels that are not there.
        """
        config.check_rows(rows, complete=True)
        labels = sorted({str(config.class_of(row)) for row in rows})
        if len(labels) < 2:
            raise UserError(f"column '{config.label}' holds only the label {labels}: a classifier needs at least two")
        return {"labels": labels}

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        return {"labels": own} if sorted(own) == sorted(facts["labels"]) else facts

    @classmethod
    def recall(cls, config: Config, model: Any) -> Facts:
        labels = [config.class_name(model.id2label[index]) for index in range(model.num_labels)]
        if len(set(labels)) < max(2, len(labels)):
            raise UserError(f"the model's labels (id2label) are {labels}: a classifier needs two or more, each of them once")
        return {"labels": labels}

    def settings(self) -> dict[str, Any]:
        labels = self.answers.labels
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }

    def target_of(self, row: Row) -> int | None:
        """Returns the id of a row's label.

        Raises:
            UserError: a label that training never saw.
        """
        label = self.answers.truth(row)
        if label is None:
            return None
        if label not in self.number:
            raise UserError(f"label '{label}' {unknown(self.answers.labels, label)}")
        return self.number[label]

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """{label: its id}."""
        return {label: index for index, label in enumerate(self.answers.labels)}

    def named(self, output: Any) -> Batch:
        """Returns the class scores before the softmax, shape (B, C), float32."""
        return {OUTPUT: output.logits.float()}

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy: (sum over labelled rows, number of labelled rows)."""
        from torch.nn import functional

        labels_B = batch["labels"]
        return functional.cross_entropy(outputs[OUTPUT], labels_B, reduction="sum"), (labels_B >= 0).sum()

    @classmethod
    def made_up_loss(cls, model: Any, rows: int, length: int) -> torch.Tensor:
        import torch
        from torch.nn import functional

        ids = torch.zeros(rows, length, dtype=torch.int64)
        logits_BC = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return functional.cross_entropy(logits_BC.float(), torch.zeros(rows, dtype=torch.int64), reduction="sum")

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over rows of T² × KL(teacher ‖ student) of the softened distributions (Hinton et al. 2015, arXiv:1503.02531)."""
        from torch.nn import functional

        student = functional.log_softmax(outputs[OUTPUT] / temperature, dim=1)
        target = functional.log_softmax(teacher[OUTPUT].float() / temperature, dim=1)
        return temperature**2 * functional.kl_div(student, target, reduction="sum", log_target=True)


def unknown(labels: list[str], label: str) -> str:
    """Returns why a label cannot be taken."""
    if named(labels):
        return f"is not among the training labels{did_you_mean(label, labels)}"
    return (
        f"is none of the model's classes, which have no names ({listed(labels)}): say which is which in {names_hint(labels, [])}"
    )
