"""Several labels for a text, the training half: a sigmoid for each label on top of the pooled first token.

Shapes: B rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from engine.answers import Row
from engine.answers.multi_label import OUTPUT, labels_of, listed, mark
from engine.data.cells import Cell
from engine.errors import UserError
from engine.tasks import FACTS, Facts
from engine.tasks._texts import NamedConfig, NumbersTask, cell_of, facts_in_order, file_of, labels_as_settings, unknown, weighted

if TYPE_CHECKING:
    import torch

    from engine.tasks import Batch


class Config(NamedConfig):
    """Any number of labels for a text, or for a pair of texts."""

    type: Literal["multi_label"]
    label: str | list[str] = "label"
    """Column that holds a list of labels; or a list of columns, one for each label, that hold 1 or 0."""
    separator: str | None = None
    """Between the labels where they stand in one text, as `,`; None: the column holds a list."""
    metric: Literal["f1_micro", "f1_macro", "subset_accuracy"] = "f1_micro"
    """Chooses the best weights."""

    @model_validator(mode="after")
    def _one_form(self) -> Config:
        if not self.label or (isinstance(self.label, list) and len(set(self.label)) < len(self.label)):
            raise ValueError("label names no column, or one of them twice")
        if self.separator is not None and (isinstance(self.label, list) or not self.separator):
            raise ValueError("separator is for labels that stand in one column, one text: leave it out")
        return self

    @property
    def truths(self) -> dict[str, Cell]:
        if isinstance(self.label, list):
            return dict.fromkeys(self.label, cell_of(mark))
        return {self.label: cell_of(lambda value: listed(value, self.separator))}

    def classes_of(self, row: Row) -> list[Any]:
        return labels_of(row, self.label, self.separator, self.names) or []

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at the labels of the training rows.

        Raises:
            UserError: `names` for labels that are not there.
        """
        found = {name for row in rows for name in labels_of(row, self.label, self.separator, {}) or []}
        self.check_names(found, file_of(rows), complete)


class Task(NumbersTask):
    """The task of several labels. Facts: `labels`, their names in the order of ids; `thresholds`, chosen once it is trained."""

    says = "a model of several labels"

    @classmethod
    def learn(cls, config: Config, rows: Sequence[Row]) -> Facts:
        """Returns the sorted labels of the training rows, or the columns of labels in their order.

        Raises:
            UserError: no row has a label, or `names` are for others.
        """
        config.check_rows(rows, complete=True)
        found = {label for row in rows for label in config.classes_of(row)}
        if not found:
            raise UserError(f"no training row has a label in {', '.join(config.truths)}: there is nothing to learn")
        if isinstance(config.label, list):
            labels = list(dict.fromkeys(config.names.get(column, column) for column in config.label))
        else:
            labels = sorted(found)
        return {"labels": labels, "thresholds": [0.5] * len(labels)}

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        return facts_in_order(facts, own)

    @classmethod
    def recall(cls, config: Config, model: Any) -> Facts:
        labels = [config.class_name(model.id2label[index]) for index in range(model.num_labels)]
        kept = getattr(model, FACTS, None) or {}
        if kept.get("type") == config.type:
            return {"labels": labels, "thresholds": kept["thresholds"]}
        if getattr(model, "problem_type", None) == "multi_label_classification":
            return {"labels": labels, "thresholds": [0.5] * len(labels)}
        raise UserError("the model is none of several labels (problem_type in its configuration): fine-tune it first")

    def settings(self) -> dict[str, Any]:
        return {**labels_as_settings(self.answers.labels), "problem_type": "multi_label_classification", **self.kept}

    def target_of(self, row: Row) -> list[float] | None:
        found, labels = self.answers.truth(row), self.answers.labels
        if found is None:
            return None
        for label in found:
            if label not in labels:
                raise UserError(f"label '{label}' {unknown(labels, label)}")
        return [float(label in found) for label in labels]

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Binary cross entropy of a row, its mean over the labels: (sum over labelled rows, their number)."""
        from torch.nn import functional

        losses_BC = functional.binary_cross_entropy_with_logits(outputs[OUTPUT], batch["labels"], reduction="none")
        return weighted(losses_BC.mean(dim=1), batch)

    def imitation(self, outputs: Batch, teacher: Batch, temperature: float) -> torch.Tensor:
        """Σ over rows of T² × KL(teacher ‖ student) of each label's softened probability, its mean over the labels."""
        from torch.nn import functional

        own_BC, target_BC = outputs[OUTPUT] / temperature, teacher[OUTPUT].float() / temperature
        cross_BC = functional.binary_cross_entropy_with_logits(own_BC, target_BC.sigmoid(), reduction="none")
        entropy_BC = functional.binary_cross_entropy_with_logits(target_BC, target_BC.sigmoid(), reduction="none")
        return temperature**2 * (cross_BC - entropy_BC).mean(dim=1).sum()
