"""95 % intervals of the numbers that are claimed: an accuracy or another metric, a drop of accuracy, a speed-up.

Shapes: N examples, R rounds of a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.randomness import generator

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
RESAMPLES = 10_000
"""Bootstrap resamples; the ends of the interval then move by a few hundredths of its width from seed to seed."""
METRIC_EXAMPLES, METRIC_RESAMPLES = 2_000_000, (200, 2000)
"""Metrics are computed over about so many examples in all, in as many resamples as that gives, between these bounds."""


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval, all in the same unit."""

    value: float
    low: float
    high: float


def accuracy_interval(correct_N: np.ndarray) -> Interval:
    """Accuracy in percent with its Wilson score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Unlike p ± z·sqrt(p(1 - p)/N) it keeps its coverage near 0 and 100 % and never leaves that range
    (Brown, Cai and DasGupta 2001, doi:10.1214/ss/1009213286).

    Args:
        correct_N: whether each example was classified right; at least one.
    """
    correct = _flags(correct_N)
    n, share = len(correct), float(correct.mean())
    scale = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    # Rounding must not put the estimate outside its own interval at 0 and 100 %.
    return Interval(100 * share, 100 * max(0.0, min(share, centre - half)), 100 * min(1.0, max(share, centre + half)))


def paired_bootstrap_drop(correct_a_N: np.ndarray, correct_b_N: np.ndarray, seed: int = 0) -> Interval:
    """By how many percent points b is less accurate than a on the same examples, with the paired bootstrap's percentile interval.

    Examples are resampled together with both verdicts (Efron and Tibshirani 1993, ch. 13; Koehn 2004, aclanthology.org/W04-3250),
    so what both models find hard or easy cancels. Two models that agree on every example get the interval [0, 0].

    Args:
        correct_a_N, correct_b_N: whether each model classified each example right, in the same order.
        seed: of the resampling.
    """
    a, b = _flags(correct_a_N), _flags(correct_b_N)
    if a.shape != b.shape:
        raise ValueError(f"paired verdicts of {len(a)} and {len(b)} examples")
    n = len(a)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    # Drawing N of N examples with replacement is one multinomial draw of how often each of the three differences occurs.
    shares = np.array([only_a, only_b, n - only_a - only_b]) / n
    counts = generator(seed, "paired bootstrap").multinomial(n, shares, size=RESAMPLES)
    return _percentile(100 * (only_a - only_b) / n, 100 * (counts[:, 0] - counts[:, 1]) / n)


def ratio_interval(times_a_R: np.ndarray, times_b_R: np.ndarray, seed: int = 0) -> Interval:
    """How many times faster b is than a: median(a) / median(b), with the paired bootstrap's percentile interval.

    A round measures both, one right after the other, and rounds are resampled as pairs: a slow spell of the machine then slows
    both sides of a resample. Ratios rather than single times, with an interval, follow Kalibera and Jones 2013
    (doi:10.1145/2464157.2464160).

    Args:
        times_a_R, times_b_R: one positive time of each round, for example its median latency over all inputs.
        seed: of the resampling.
    """
    a, b = (np.asarray(times, dtype=np.float64) for times in (times_a_R, times_b_R))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"paired rounds of shapes {a.shape} and {b.shape}")
    if not (a > 0).all() or not (b > 0).all():
        raise ValueError("a time is not positive")
    rows = generator(seed, "ratio bootstrap").integers(len(a), size=(RESAMPLES, len(a)))
    return _percentile(float(np.median(a) / np.median(b)), np.median(a[rows], axis=1) / np.median(b[rows], axis=1))


def median_interval(values_R: np.ndarray) -> Interval:
    """The median with its distribution-free interval: two order statistics (Conover 1999, section 3.2, normal approximation).

    Args:
        values_R: for example the latency of each round; at least one.
    """
    values = np.sort(np.asarray(values_R, dtype=np.float64))
    n = len(values)
    reach = Z * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
    return Interval(float(np.median(values)), float(values[low]), float(values[high]))


def bootstrap_metrics(
    metrics: Callable[[np.ndarray], dict[str, float]], n: int, seed: int = 0, resamples: int | None = None
) -> dict[str, Interval]:
    """Any metrics over examples, with the bootstrap's percentile interval (Efron and Tibshirani 1993, ch. 13).

    Args:
        metrics: returns the metrics over the examples with the given numbers, shape (N,), each as often as it comes.
        n: examples, at least one.
        seed: of the resampling.
        resamples: how many; None: as METRIC_EXAMPLES says.
    """
    resamples = resamples or min(METRIC_RESAMPLES[1], max(METRIC_RESAMPLES[0], METRIC_EXAMPLES // n))
    draw = generator(seed, "metrics bootstrap")
    drawn = [metrics(draw.integers(n, size=n)) for _ in range(resamples)]
    return {name: _percentile(value, np.array([found[name] for found in drawn])) for name, value in metrics(np.arange(n)).items()}


def _flags(correct: np.ndarray) -> np.ndarray:
    flags = np.asarray(correct, dtype=bool)
    if flags.ndim != 1 or not len(flags):
        raise ValueError(f"verdicts of shape {flags.shape}: at least one example is needed")
    return flags


def _percentile(value: float, resampled: np.ndarray) -> Interval:
    low, high = np.nanquantile(resampled, [0.025, 0.975])  # a correlation of equal values is no number
    return Interval(value, float(low), float(high))
