"""Text classification, the answering half: class scores in, a label with its probability out.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import MODEL, Answer, Arrays, Metric, Row, Run, ServedTensor
from engine.answers._metrics import class_counts, f1_macro, matthews
from engine.answers._texts import OUTPUT, SMALLEST, TextAnswers, digits


class Answers(TextAnswers):
    """One label for a text or a pair of texts. Facts: `label`, `names`, `positive`, and `labels` in the order of ids."""

    METRICS = {
        "accuracy": Metric("accuracy", counted=True),
        "f1": Metric("f1"),
        "f1_macro": Metric("f1_macro"),
        "matthews": Metric("matthews", unit=""),
    }

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
        """Returns accuracy and F1 in percent, Matthews correlation × 100, mean loss in nats, and the number of examples.

        `f1`, of the class `positive`, is there where there are two classes.
        """
        predicted_N, truth_N = self._numbers(answers, rows)
        counts = class_counts(predicted_N, truth_N, len(self.labels))
        shares = [answer["scores"][str(self.truth(row))] for answer, row in zip(answers, rows, strict=True)]
        binary = {"f1": 100.0 * float(counts.f1[self.positive])} if len(self.labels) == 2 else {}
        return {
            "accuracy": 100.0 * float((predicted_N == truth_N).mean()),
            "f1_macro": 100.0 * f1_macro(predicted_N, truth_N, len(self.labels)),
            **binary,
            "matthews": 100.0 * matthews(counts),
            "loss": float(-np.log(np.maximum(shares, SMALLEST)).mean()),
            "examples": len(rows),
        }

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns precision, recall, F1 in percent and the number of rows of each class."""
        return class_counts(*self._numbers(answers, rows), len(self.labels)).table(self.labels)

    off_by = "probability of the wrong label"

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns the probability of the label that was given, 0 where it is right."""
        return np.where(self.right(answers, rows), 0.0, [answer["score"] for answer in answers])

    def confusion(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        predicted_N, truth_N = self._numbers(answers, rows)
        pairs, counts = np.unique(np.stack([truth_N, predicted_N]), axis=1, return_counts=True)
        return {"labels": self.labels, "counts": np.vstack([pairs, counts]).T.tolist()}

    def _numbers(self, answers: list[Answer], rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of the predicted and of the true classes, shape (N,) each."""
        number = {label: index for index, label in enumerate(self.labels)}
        predicted_N = np.array([number[answer["label"]] for answer in answers])
        return predicted_N, np.array([number[str(self.truth(row))] for row in rows])

    @property
    def positive(self) -> int:
        """Id of the class whose F1 is `f1`: that of the fact `positive`, else the last."""
        named = self.facts["positive"]
        return len(self.labels) - 1 if named is None else self.labels.index(named)

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
