"""Figures of classes and of numbers, by NumPy alone: what is judged in training is judged the same wherever a bundle runs.

Shapes: N rows, C classes or labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Counts(NamedTuple):
    """What there is to count of each class or label, each of shape (C,)."""

    both: np.ndarray
    """Rows where it is predicted and true."""
    predicted: np.ndarray
    true: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """F1 of each; 0 of one that is neither predicted nor true anywhere."""
        return _share(2 * self.both, self.predicted + self.true)

    @property
    def f1_micro(self) -> float:
        """F1 of all decisions together."""
        return float(_share(2 * self.both.sum(), self.predicted.sum() + self.true.sum()))

    def table(self, names: list[str]) -> dict[str, dict[str, float]]:
        """Returns {name: precision, recall and F1 in percent, and rows where it is true}."""
        figures = zip(
            100 * _share(self.both, self.predicted), 100 * _share(self.both, self.true), 100 * self.f1, self.true, strict=True
        )
        keys = ("precision", "recall", "f1", "rows")
        return {name: dict(zip(keys, map(float, row), strict=True)) for name, row in zip(names, figures, strict=True)}


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)


def class_counts(predicted_N: np.ndarray, truth_N: np.ndarray, classes: int) -> Counts:
    """Counts classes of which each row has one."""
    both = np.bincount(truth_N[predicted_N == truth_N], minlength=classes)
    return Counts(both, np.bincount(predicted_N, minlength=classes), np.bincount(truth_N, minlength=classes))


def label_counts(predicted_NC: np.ndarray, truth_NC: np.ndarray) -> Counts:
    """Counts labels of which each row has any number, from two boolean arrays."""
    return Counts((predicted_NC & truth_NC).sum(axis=0), predicted_NC.sum(axis=0), truth_NC.sum(axis=0))


def f1_macro(predicted_N: np.ndarray, truth_N: np.ndarray, classes: int) -> float:
    """Returns the mean F1 of the classes that are predicted or true somewhere."""
    counts = class_counts(predicted_N, truth_N, classes)
    return float(counts.f1[counts.predicted + counts.true > 0].mean())


def matthews(counts: Counts) -> float:
    """Returns the correlation of predicted and true classes, -1 to 1 (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006).

    It is 0 where one class is always predicted, or always true.
    """
    both, predicted, true = (array.astype(np.float64) for array in counts)
    rows = true.sum()
    spread = (rows**2 - (predicted**2).sum()) * (rows**2 - (true**2).sum())
    return float((rows * both.sum() - (predicted * true).sum()) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(own_N: np.ndarray, other_N: np.ndarray) -> float:
    """Returns the correlation of two lists of numbers, -1 to 1; 0 where one of them is constant."""
    centred = []
    for values_N in (own_N, other_N):
        if not len(values_N) or np.max(values_N) == np.min(values_N):
            return 0.0
        scaled_N = np.asarray(values_N, dtype=np.float64) / np.abs(values_N).max()  # so that no square leaves a float's range
        scaled_N = scaled_N - scaled_N.mean()
        centred.append(scaled_N / np.sqrt((scaled_N**2).sum()))
    return float(np.clip((centred[0] * centred[1]).sum(), -1.0, 1.0))


def ranks(values_N: np.ndarray) -> np.ndarray:
    """Returns the rank of each number from 1; equal ones share the mean of their ranks."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_N]


def spearman(own_N: np.ndarray, other_N: np.ndarray) -> float:
    """Returns the correlation of the ranks, -1 to 1; 0 where one of the lists is constant."""
    return pearson(ranks(own_N), ranks(other_N))


def best_threshold(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Returns the score from which on a label is given, so that F1 is largest; of equally good ones that nearest to 0.5.

    It lies half-way between two scores, so that a score that moves a little stays on its side.

    Args:
        score_N: probabilities.
        truth_N: whether the row has the label; one has.
    """
    order = np.argsort(-score_N, kind="stable")
    score_N, truth_N = score_N[order], truth_N[order]
    f1_N = 2 * np.cumsum(truth_N) / (np.arange(1, len(order) + 1) + truth_N.sum())
    below_N = np.append(score_N[1:], -1.0)
    cut_N = (score_N + np.maximum(below_N, 0.0)) / 2
    f1_N = np.where(score_N > below_N, f1_N, -1.0)
    best = np.flatnonzero(f1_N >= f1_N.max() - 1e-12)
    return float(cut_N[best[np.abs(cut_N[best] - 0.5).argmin()]])
