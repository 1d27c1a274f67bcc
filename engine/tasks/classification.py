"""Text classification, the training half: a softmax over labels on top of the pooled first token.

Shapes: B rows, L tokens, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from engine.answers import Row
from engine.answers.classification import OUTPUT, label_of
from engine.data.cells import Cell, label_cell, refuse_scores
from engine.data.columns import Proposal
from engine.errors import UserError, did_you_mean
from engine.tasks import Example, Facts
from engine.tasks._texts import (
    NamedConfig,
    TextTask,
    facts_in_order,
    file_of,
    keys_as_text,
    labels_as_settings,
    unknown,
    weighted,
)

if TYPE_CHECKING:
    import torch

    from engine.data.columns import Table
    from engine.tasks import Batch


LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "target", "topic", "stars", "rating", "score", "y")
TEXTS = ("text", "sentence", "review", "content", "body", "comment", "message", "question", "title")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
"""Names of columns that data sets have, likelier ones first; of pairs of texts, both."""
MOST_CLASSES = 1000
"""A column with more values holds no classes."""


def _like(names: tuple[str, ...]) -> Callable[[str], int]:
    return lambda column: names.index(column.lower()) if column.lower() in names else len(names)


def _labels(table: Table, named: dict[str, str]) -> list[str]:
    """Returns the columns that may hold labels, fewest values first: short values that repeat, and no scores."""
    found = []
    for name, column in table.columns.items():
        repeats = 2 <= len(column.values) <= MOST_CLASSES and column.filled >= 2 * len(column.values)
        if repeats and not column.nested and column.mean_words <= 5 and name not in named.values():
            try:
                refuse_scores(column.values, name)
            except UserError:
                continue
            found.append(name)
    return sorted(found, key=lambda name: len(table.columns[name].values))


def _texts(table: Table, label: str) -> list[str]:
    """Returns the columns that may hold texts, longest first."""
    columns = [column for column in table.columns.values() if column.name != label and column.mean_characters >= 4]
    return [column.name for column in sorted(columns, key=lambda column: -column.mean_characters)]


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(NamedConfig):
    """One label for a text, or for a pair of texts."""

    type: Literal["classification"]
    label: str = "label"
    """Column of the label."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal` lets rows that are classified well count less: (1 - p)^gamma × cross entropy (arXiv:1708.02002)."""
    gamma: float = Field(2.0, ge=0, allow_inf_nan=False)
    """Of the focal loss; 0 is cross entropy, 2 is the paper's choice."""
    class_weights: Literal["balanced"] | dict[str, Weight] | None = None
    """What a row of a class counts in the loss. `balanced`: rows / (classes × rows of the class), so that all classes count the
    same; or {label: weight}, 1 where nothing is said; None: every row the same."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """`balanced` draws every class equally often: in an epoch, which stays as long, rows of large classes are left out, those of
    small ones come again."""
    metric: Literal["accuracy", "f1", "f1_macro", "matthews"] = "accuracy"
    """Chooses the best weights. `f1` is that of the class `positive`, for two classes."""
    positive: str | None = None
    """The class, as it is shown, that `f1` looks at; None: the last one, as in 0 and 1, no and yes."""

    _weights = field_validator("class_weights", mode="before")(lambda value: keys_as_text(value))

    @property
    def truths(self) -> dict[str, Cell]:
        return {self.label: label_cell}

    def classes_of(self, row: Row) -> list[Any]:
        label = label_of(row, self.label, self.names)
        return [] if label is None else [label]

    def check_rows(self, rows: Sequence[Row], complete: bool) -> None:
        """Looks at the labels of the training rows, as the file has them.

        Raises:
            UserError: numbers that are scores, or `names` for labels that are not there.
        """
        labels = {str(row[self.label]) for row in rows}
        refuse_scores(labels, self.label, file_of(rows))
        self.check_names(labels, file_of(rows), complete)

    @classmethod
    def propose(cls, table: Table, given: dict[str, str]) -> Proposal | None:
        named = {key: table.column(name).name for key, name in given.items()}
        label = named.get("label") or next(iter(sorted(_labels(table, named), key=_like(LABELS))), None)
        if label is None:
            return None
        pair = next((pair for pair in PAIRS if all(name in table.columns for name in pair)), None)
        if pair and not given.keys() & {"text", "text_pair"}:
            named |= {"text": pair[0], "text_pair": pair[1]}
        text = named.get("text") or next(iter(sorted(_texts(table, label), key=_like(TEXTS))), None)
        if text is None:
            return None
        section = {"text": text, **({"text_pair": named["text_pair"]} if "text_pair" in named else {}), "label": label}
        classes = table.columns[label]
        common = [f"{name} {count / classes.filled:.0%}" for name, count in classes.values.most_common(6)]
        more = ", …" if len(classes.values) > 6 else ""
        seen = {key: f"{table.columns[name].mean_words:.0f} words on average" for key, name in section.items()}
        seen["label"] = f"{len(classes.values)} labels: {', '.join(common)}{more}"
        numbers = all(name.lstrip("-").isdigit() for name in classes.values)
        names = ", ".join(f"{name}: …" for name in sorted(classes.values)[:3])
        advice = f"names: {{{names}}}  # what they shall be called" if numbers else ""
        return Proposal(section, seen, [name for key, name in section.items() if key != "label"], advice=advice)


class Task(TextTask):
    """The classification task. Facts: `labels`, class names in the order of their ids."""

    head = "AutoModelForSequenceClassification"
    says = "a classifier"
    outputs = [OUTPUT]

    def __init__(self, config: Config, facts: Facts, tokenizer: Any, max_length: int) -> None:
        _check(config, facts["labels"])
        super().__init__(config, facts, tokenizer, max_length)
        self.weight_C: np.ndarray | None = None
        """What a row of each class counts in the loss, float32."""

    @classmethod
    def learn(cls, config: Config, rows: Sequence[Row]) -> Facts:
        """Returns the sorted labels of the training rows.

        Raises:
            UserError: fewer than two, numbers that are scores, or `names` for labels that are not there.
        """
        config.check_rows(rows, complete=True)
        labels = sorted({label for row in rows for label in config.classes_of(row)})
        if len(labels) < 2:
            raise UserError(f"column '{config.label}' holds only the label {labels}: a classifier needs at least two")
        return {"labels": labels}

    @classmethod
    def in_order(cls, facts: Facts, own: list[str]) -> Facts:
        return facts_in_order(facts, own)

    @classmethod
    def recall(cls, config: Config, model: Any) -> Facts:
        labels = [config.class_name(model.id2label[index]) for index in range(model.num_labels)]
        if len(set(labels)) < max(2, len(labels)):
            raise UserError(f"the model's labels (id2label) are {labels}: a classifier needs two or more, each of them once")
        return {"labels": labels}

    def settings(self) -> dict[str, Any]:
        return {**labels_as_settings(self.answers.labels), "problem_type": "single_label_classification", **self.kept}

    def begin(self, examples: Sequence[Example]) -> None:
        """Weighs the classes; over the labelled rows the mean weight is 1."""
        chosen, labels = self.config.class_weights, list(self.number)
        if chosen is None:
            return
        rows_C = np.bincount([e["label"] for e in examples if e["label"] is not None], minlength=len(labels))
        if chosen == "balanced":
            weight_C = rows_C.sum() / (len(labels) * np.maximum(rows_C, 1))
        else:
            weight_C = np.array([chosen.get(label, 1.0) for label in labels])
        self.weight_C = (weight_C * rows_C.sum() / max((weight_C * rows_C).sum(), 1e-12)).astype(np.float32)

    def groups(self, examples: Sequence[Example]) -> np.ndarray | None:
        if self.config.sampling == "shuffle":
            return None
        return np.asarray([-1 if example["label"] is None else example["label"] for example in examples])

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

    def truths(self, found: list[int | None]) -> dict[str, np.ndarray]:
        """Returns `labels` (B,), -100 if none; and `weights` (B,), 0 if none, where classes are weighed."""
        arrays = super().truths(found)
        if self.weight_C is not None:
            labels_B, weight_C1 = arrays["labels"], np.append(self.weight_C, np.float32(0))
            arrays["weights"] = weight_C1[np.where(labels_B >= 0, labels_B, -1)]
        return arrays

    def count(self, batch: Batch) -> float:
        return float(batch["weights"].sum()) if "weights" in batch else super().count(batch)

    def named(self, output: Any) -> Batch:
        """Returns the class scores before the softmax, shape (B, C), float32."""
        return {OUTPUT: output.logits.float()}

    def loss_of(self, outputs: Batch, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy or focal loss: (sum over labelled rows, their number), both by the weights of the classes."""
        from torch.nn import functional

        labels_B, logits_BC = batch["labels"], outputs[OUTPUT]
        focal = self.config.loss == "focal"
        if not focal and "weights" not in batch:
            return functional.cross_entropy(logits_BC, labels_B, reduction="sum"), (labels_B >= 0).sum()
        losses_B = functional.cross_entropy(logits_BC, labels_B, reduction="none")
        if focal:
            losses_B = losses_B * (-(-losses_B).expm1()).clamp(min=1e-12) ** self.config.gamma
        if "weights" in batch:
            return weighted(losses_B, batch)
        return losses_B.sum(), (labels_B >= 0).sum()

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


def _check(config: Config, labels: list[str]) -> None:
    """Raises UserError for keys of the section that do not go with the labels."""
    named = {"positive": [config.positive] if config.positive is not None else []}
    named["class_weights"] = list(config.class_weights) if isinstance(config.class_weights, dict) else []
    for key, names in named.items():
        for name in names:
            if name not in labels:
                raise UserError(f"task.{key}: '{name}' is not among the labels{did_you_mean(name, labels)}")
    if config.metric == "f1" and len(labels) != 2:
        raise UserError(f"task.metric=f1 is of two classes, and there are {len(labels)}: take f1_macro")
