"""Several labels for a text or a pair of texts, the answering half: each label on its own, by its own threshold.

Shapes: N rows, C labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import MODEL, Answer, Arrays, Metric, Row, RowError, Run, ServedTensor
from engine.answers._metrics import Counts, best_threshold, label_counts
from engine.answers._texts import OUTPUT, SMALLEST, TextAnswers, digits

_SEVERAL = re.compile(r"[\s,;|/]")
MIN_ROWS = 5
"""A label on fewer validation rows keeps the threshold of 0.5: so few would say little about a better one."""


class Answers(TextAnswers):
    """Any number of labels for a text or a pair. Facts: `label`, `separator`, `names`, `labels` by id, `thresholds` of them."""

    METRICS = {
        "f1_micro": Metric("f1_micro"),
        "f1_macro": Metric("f1_macro"),
        "subset_accuracy": Metric("subset_accuracy", counted=True),
    }

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        self.threshold_C = np.array([float(value) for value in facts["thresholds"]])
        if not 0 < len(set(self.labels)) == len(self.labels) == len(self.threshold_C):
            raise ValueError("labels must be there, each of them once and with a threshold")

    @property
    def labels(self) -> list[str]:
        return self.facts["labels"]

    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns {"labels", "scores": {label: probability}} of each row; the labels are in the order of their ids."""
        scores_NC = sigmoid(run(MODEL, self.prepare(rows))[OUTPUT])
        return self.revised([{"scores": dict(zip(self.labels, digits(scores_C), strict=True))} for scores_C in scores_NC])

    def revised(self, answers: list[Answer]) -> list[Answer]:
        found_NC = self._scores(answers) >= self.threshold_C
        names = np.array(self.labels, dtype=np.object_)
        return [
            {"labels": names[found_C].tolist(), "scores": answer["scores"]}
            for found_C, answer in zip(found_NC, answers, strict=True)
        ]

    def choose(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns `thresholds`: of each label that with the largest F1 on these rows (Yang 2001, doi:10.1145/383952.383975)."""
        scores_NC, truth_NC = self._scores(answers), self._true(rows)
        columns = zip(scores_NC.T, truth_NC.T, strict=True)
        chosen = [best_threshold(score_N, truth_N) if truth_N.sum() >= MIN_ROWS else 0.5 for score_N, truth_N in columns]
        return {"thresholds": [round(value, 6) for value in chosen]}

    def truth(self, row: Row) -> list[str] | None:
        """Returns the names of a row's labels, in no order; None for an unlabelled row.

        Raises:
            RowError: a column that holds something else.
        """
        facts = self.facts
        return labels_of(row, facts["label"], facts["separator"], facts["names"])

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns F1 and the share of rows with exactly their labels in percent, mean loss of a label in nats, and examples."""
        truth_NC, counts = self._true(rows), self._counts(answers, rows)
        scores_NC = self._scores(answers)
        missed_NC = np.maximum(np.where(truth_NC, scores_NC, 1 - scores_NC), SMALLEST)
        return {
            "f1_micro": 100.0 * counts.f1_micro,
            "f1_macro": 100.0 * float(counts.f1.mean()),
            "subset_accuracy": 100.0 * float(self.right(answers, rows).mean()),
            "loss": float(-np.log(missed_NC).mean()),
            "examples": len(rows),
        }

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns precision, recall, F1 in percent, the number of rows of each label, and how often it is wrong and missed."""
        counts = self._counts(answers, rows)
        errors = zip(counts.predicted - counts.both, counts.true - counts.both, strict=True)
        return {
            label: {**figures, "wrong": float(wrong), "missed": float(missed)}
            for (label, figures), (wrong, missed) in zip(counts.table(self.labels).items(), errors, strict=True)
        }

    off_by = "distance of the worst label's probability from the truth"

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns how far the probability of the worst wrong or missed label lies from 0 or 1; 0 where all labels are right."""
        truth_NC = self._true(rows)
        off_NC = np.where(self._given(answers) == truth_NC, 0.0, np.abs(truth_NC - self._scores(answers)))
        return off_NC.max(axis=1, initial=0.0)

    def right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        return (self._given(answers) == self._true(rows)).all(axis=1)

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the micro F1 of the labels of one model against those of the other; 1 where neither gives any."""
        counts = label_counts(self._given(answers), self._given(others))
        return counts.f1_micro if counts.predicted.sum() + counts.true.sum() else 1.0

    def _counts(self, answers: list[Answer], rows: Sequence[Row]) -> Counts:
        return label_counts(self._given(answers), self._true(rows))

    def _given(self, answers: list[Answer]) -> np.ndarray:
        return self._marked([answer["labels"] for answer in answers])

    def _true(self, rows: Sequence[Row]) -> np.ndarray:
        return self._marked([self.truth(row) or [] for row in rows])

    def _marked(self, found: list[list[str]]) -> np.ndarray:
        """Returns which labels are named, boolean of shape (N, C)."""
        number = {label: index for index, label in enumerate(self.labels)}
        marked_NC = np.zeros((len(found), len(number)), dtype=bool)
        for row, names in enumerate(found):
            marked_NC[row, [number[name] for name in names]] = True
        return marked_NC

    def _scores(self, answers: list[Answer]) -> np.ndarray:
        scores = [list(answer["scores"].values()) for answer in answers]
        return np.array(scores, dtype=np.float64).reshape(len(answers), len(self.labels))

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "label", "prediction": lists of labels, "scores" in the order of the labels}."""
        return {
            "id": self.identity(row),
            "label": self.truth(row),
            "prediction": answer["labels"],
            "scores": [round(score, 6) for score in answer["scores"].values()],
        }

    @property
    def served(self) -> list[ServedTensor]:
        return [ServedTensor("LABELS", "STRING", 1), ServedTensor("SCORES", "FP32", len(self.labels), labelled=True)]

    def tensors(self, answers: list[Answer]) -> Arrays:
        """Returns LABELS, the labels of each row as a JSON list, and SCORES."""
        texts = [json.dumps(answer["labels"], ensure_ascii=False).encode() for answer in answers]
        labels_N1 = np.array(texts, dtype=np.object_).reshape(len(answers), 1)
        return {"LABELS": labels_N1, "SCORES": self._scores(answers).astype(np.float32)}

    def line(self, answer: Answer) -> str:
        """Returns the labels with their probabilities, `-` for none."""
        return ", ".join(f"{label} {answer['scores'][label]:.4f}" for label in answer["labels"]) or "-"


def labels_of(row: Row, label: str | list[str], separator: str | None, names: dict[str, str]) -> list[str] | None:
    """Returns the names of a row's labels, each once; None for an unlabelled row.

    Args:
        label: column of the labels, or the columns of one each.
        separator: between labels that stand in one text.
        names: replace the labels of the file.

    Raises:
        RowError: a column that holds something else.
    """
    columns = [label] if isinstance(label, str) else label
    if all(row.get(column) is None for column in columns):
        return None
    found: list[str] = []
    for column in columns:
        try:
            found += listed(row[column], separator) if isinstance(label, str) else [column] * mark(row.get(column))
        except ValueError as error:
            raise RowError(f"column '{column}' {error}") from None
    return list(dict.fromkeys(names.get(name, name) for name in found))


def listed(value: Any, separator: str | None) -> list[str]:
    """Returns the labels that a cell holds: a list, a text that `separator` cuts, or without one a word that is a label alone.

    Raises:
        ValueError: something else, or a text that seems to hold several labels where there is no separator.
    """
    if isinstance(value, str) and (separator or not value or not _SEVERAL.search(value)):
        return [part.strip() for part in (value.split(separator) if separator else [value]) if part.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(label, (str, int)) for label in value):
        fix = "write a list, or say task.separator if they stand in one text"
        raise ValueError(f"holds {value!r:.60}, which is no list of labels: {fix}")
    return [str(label) for label in value]


def mark(value: Any) -> bool:
    """Says whether the cell of a column of one label says yes.

    Raises:
        ValueError: it says neither yes nor no.
    """
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise ValueError(f"holds {value!r:.60}: a column of one label holds 1 or 0, true or false")


def sigmoid(logits_NC: np.ndarray) -> np.ndarray:
    """Returns float32 probabilities, shape (N, C)."""
    small_NC = np.exp(-np.abs(logits_NC))
    return np.where(logits_NC >= 0, 1, small_NC) / (1 + small_NC)
