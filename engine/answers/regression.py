"""Regression, the answering half: one or several numbers for a text or a pair of texts, in the unit of the data.

Shapes: N rows, K numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.answers import MODEL, Answer, Arrays, Metric, Row, RowError, Run, ServedTensor
from engine.answers._metrics import pearson, spearman
from engine.answers._texts import OUTPUT, TextAnswers, digits

EQUAL = 0.25
"""Two models give the same number when theirs differ by no more than this share of its standard deviation."""


class Answers(TextAnswers):
    """Numbers for a text or a pair of texts. Facts: `label`, `bounds`; of each column `mean` and `sd` in the training rows."""

    METRICS = {
        "pearson": Metric("pearson", unit=""),
        "spearman": Metric("spearman", unit=""),
        "rmse": Metric("rmse", higher_is_better=False, unit=""),
        "mae": Metric("mae", higher_is_better=False, unit=""),
    }

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        super().__init__(facts, tokenizer)
        self.numbers = columns_of(facts["label"])
        """Columns of the numbers, in order."""
        self.mean_K, self.sd_K = (np.array([float(value) for value in facts[key]]) for key in ("mean", "sd"))
        if not len(self.numbers) == len(self.mean_K) == len(self.sd_K) or not (self.sd_K > 0).all():
            raise ValueError("mean and sd must be numbers for each column, sd above 0")

    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns {"values": {column: number}} of each row, none beyond `bounds`."""
        values_NK = self.mean_K + self.sd_K * run(MODEL, self.prepare(rows))[OUTPUT].astype(np.float64)
        if self.facts.get("bounds"):
            values_NK = np.clip(values_NK, *self.facts["bounds"])
        return [{"values": dict(zip(self.numbers, digits(values_K), strict=True))} for values_K in values_NK]

    def truth(self, row: Row) -> list[float] | None:
        """Returns a row's numbers, None for a row without any.

        Raises:
            RowError: a column holds no finite number.
        """
        return numbers_of(row, self.numbers)

    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Returns correlations × 100, errors in the unit of the data, the mean squared error of standardised numbers, examples.

        Of several columns a figure is the mean of theirs, and each has its own beside it, as in `pearson_COLUMN`.
        """
        given_NK, truth_NK = self._numbers(answers), np.array([self.truth(row) for row in rows])
        off_NK = given_NK - truth_NK
        each = {
            "pearson": [100.0 * pearson(own, true) for own, true in zip(given_NK.T, truth_NK.T, strict=True)],
            "spearman": [100.0 * spearman(own, true) for own, true in zip(given_NK.T, truth_NK.T, strict=True)],
            "rmse": np.sqrt((off_NK**2).mean(axis=0)),
            "mae": np.abs(off_NK).mean(axis=0),
        }
        found = {name: float(np.mean(values)) for name, values in each.items()}
        if len(self.numbers) > 1:
            for name, values in each.items():
                found |= {f"{name}_{column}": float(value) for column, value in zip(self.numbers, values, strict=True)}
        return {**found, "loss": float(((off_NK / self.sd_K) ** 2).mean()), "examples": len(rows)}

    off_by = "standard deviations off"

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns by how many standard deviations of the training rows the worst number of a row is off."""
        truth_NK = np.array([self.truth(row) for row in rows])
        return np.abs((self._numbers(answers) - truth_NK) / self.sd_K).max(axis=1)

    def points(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, np.ndarray]:
        truth_NK = np.array([self.truth(row) for row in rows])
        pairs = zip(self.numbers, truth_NK.T, self._numbers(answers).T, strict=True)
        return {column: np.stack([true_N, given_N], axis=1) for column, true_N, given_N in pairs}

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns the share of rows whose numbers are nearly equal (EQUAL)."""
        apart_NK = np.abs(self._numbers(answers) - self._numbers(others)) / self.sd_K
        return float((apart_NK <= EQUAL).all(axis=1).mean())

    def _numbers(self, answers: list[Answer]) -> np.ndarray:
        return np.array([list(answer["values"].values()) for answer in answers], dtype=np.float64)

    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns {"id", "label", "prediction"}; of several columns both are lists."""
        truth, given = self.truth(row), list(answer["values"].values())
        shown = (truth, given) if len(self.numbers) > 1 else (truth and truth[0], given[0])
        return {"id": self.identity(row), "label": shown[0], "prediction": shown[1]}

    @property
    def served(self) -> list[ServedTensor]:
        return [ServedTensor("VALUES", "FP32", len(self.numbers))]

    def tensors(self, answers: list[Answer]) -> Arrays:
        return {"VALUES": self._numbers(answers).astype(np.float32).reshape(len(answers), len(self.numbers))}

    def line(self, answer: Answer) -> str:
        return "\t".join(f"{value:.6g}" for value in answer["values"].values())


def columns_of(label: str | list[str]) -> list[str]:
    """Returns the columns of the numbers."""
    return [label] if isinstance(label, str) else label


def numbers_of(row: Row, columns: list[str]) -> list[float] | None:
    """Returns a row's numbers, None for a row without any.

    Raises:
        RowError: a column holds no finite number.
    """
    if all(row.get(column) is None for column in columns):
        return None
    found = []
    for column in columns:
        try:
            found.append(number(row.get(column)))
        except ValueError as error:
            raise RowError(f"column '{column}' {error}") from None
    return found


def number(value: Any) -> float:
    """Returns the number that a cell holds.

    Raises:
        ValueError: none, or one that is not finite.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"holds {value!r:.60}, and regression takes finite numbers: mend it, or leave the row out")
    return found
