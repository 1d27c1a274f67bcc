"""Text classification, the answering half: class scores in, a label with its probability out.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import MODEL, Answer, Arrays, Metric, Row, Run, ServedTensor
from engine.answers._texts import TextAnswers, digits

OUTPUT = "logits"
SMALLEST = float(np.finfo(np.float32).tiny)
"""A probability that rounds to 0 counts as this much in the loss."""


class Answers(TextAnswers):
    """One label for a text or a pair of texts. Facts: `text`, `text_pair`, `label`, `names`, and `labels` in the order of ids."""

    metric = Metric("accuracy", counted=True)

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError("labels must be at least two, each of them once")

    @property
    def labels(self) -> list[str]:
        return self.facts["labels"]

    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns {"label", "score", "scores": {label: probability}} of each row."""
        return [self._answer(scores_C) for scores_C in softmax(run(MODEL, self.prepare(rows))[OUTPUT])]

    def _answer(self, scores_C: np.ndarray) -> Answer:
        best = self.labels[int(scores_C.argmax())]
        scores = dict(zip(self.labels, digits(scores_C), strict=True))
        return {"label": best, "score": scores[best], "scores": scores}

    def truth(self, row: Row) -> str | None:
        """Returns the name of a row's label, None for an unlabelled row."""
        return label_of(row, self.facts["label"], self.facts["names"])

    def right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        return np.array([answer["label"] == self.truth(row) for answer, row in zip(answers, rows, strict=True)], dtype=bool)

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns accuracy and macro F1 in percent, mean loss in nats, and the number of examples."""
        number = {label: index for index, label in enumerate(self.labels)}
        truth_N = np.array([number[str(self.truth(row))] for row in rows])
        predicted_N = np.array([number[answer["label"]] for answer in answers])
        shares = [answer["scores"][str(self.truth(row))] for answer, row in zip(answers, rows, strict=True)]
        return {
            "accuracy": 100.0 * float((predicted_N == truth_N).mean()),
            "f1_macro": 100.0 * f1_macro(predicted_N, truth_N, len(number)),
            "loss": float(-np.log(np.maximum(shares, SMALLEST)).mean()),
            "examples": len(rows),
        }

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the share of rows with the same label."""
        return float(np.mean([answer["label"] == other["label"] for answer, other in zip(answers, others, strict=True)]))

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "label", "prediction", "scores" in the order of the labels}."""
        return {
            "id": self.identity(row),
            "label": self.truth(row),
            "prediction": answer["label"],
            "scores": [round(score, 6) for score in answer["scores"].values()],
        }

    @property
    def served(self) -> list[ServedTensor]:
        return [ServedTensor("LABEL", "STRING", 1), ServedTensor("SCORES", "FP32", len(self.labels), labelled=True)]

    def tensors(self, answers: list[Answer]) -> Arrays:
        best = np.array([answer["label"].encode() for answer in answers], dtype=np.object_)
        scores_NC = np.array([list(answer["scores"].values()) for answer in answers], dtype=np.float32)
        return {"LABEL": best.reshape(len(answers), 1), "SCORES": scores_NC.reshape(len(answers), len(self.labels))}

    def line(self, answer: Answer) -> str:
        return f"{answer['label']}\t{answer['score']:.4f}"


def label_of(row: Row, column: str, names: dict[str, str]) -> str | None:
    """Returns the name of a row's label, None for an unlabelled row."""
    value = row.get(column)
    return None if value is None else names.get(str(value), str(value))


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Returns float32 probabilities, shape (N, C)."""
    exponentials = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def f1_macro(predicted_N: np.ndarray, truth_N: np.ndarray, classes: int) -> float:
    """Returns the mean F1 of the classes that are predicted or true somewhere."""
    both = np.bincount(truth_N[predicted_N == truth_N], minlength=classes)
    either = np.bincount(predicted_N, minlength=classes) + np.bincount(truth_N, minlength=classes)
    return float((2 * both[either > 0] / either[either > 0]).mean())
