"""Intervals: published values, another implementation, and laws that hold for any data."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engine.intervals import accuracy_interval, bootstrap_metrics, median_interval, paired_bootstrap_drop, ratio_interval

verdicts = hnp.arrays(bool, st.integers(1, 60))


def flags(right, n):
    return np.arange(n) < right


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_newcombes_published_table(right, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    found = accuracy_interval(flags(right, n))
    assert found.value == pytest.approx(100 * right / n)
    assert (found.low, found.high) == (pytest.approx(100 * low, abs=0.005), pytest.approx(100 * high, abs=0.005))


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 7), (850, 1000)])
def test_wilson_agrees_with_scipy(right, n):
    stats = pytest.importorskip("scipy.stats")
    theirs = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert accuracy_interval(flags(right, n))[1:] == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-9)


@given(verdicts)
def test_an_accuracy_lies_in_its_interval_and_both_within_0_and_100(correct):
    value, low, high = accuracy_interval(correct)
    assert 0 <= low <= value <= high <= 100
    assert low < high


@given(verdicts)
def test_wilson_of_the_errors_mirrors_wilson_of_the_hits(correct):
    value, low, high = accuracy_interval(correct)
    assert accuracy_interval(~correct) == pytest.approx((100 - value, 100 - high, 100 - low), abs=1e-9)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(*[hnp.arrays(bool, n)] * 2)), st.integers(0, 5))
def test_a_drop_is_the_difference_of_accuracies_and_lies_in_its_interval(pair, seed):
    a, b = pair
    value, low, high = paired_bootstrap_drop(a, b, seed)
    assert value == pytest.approx(100 * (a.mean() - b.mean()))
    assert -100 <= low <= value <= high <= 100


@given(verdicts)
def test_a_model_loses_nothing_to_itself(correct):
    assert paired_bootstrap_drop(correct, correct) == (0, 0, 0)


def test_the_drop_agrees_with_resampling_the_examples_one_by_one():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    a, b = draw.random(800) < 0.87, draw.random(800) < 0.85
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: 100 * (x.mean(axis=axis) - y.mean(axis=axis)),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=2,
    ).confidence_interval
    assert paired_bootstrap_drop(a, b)[1:] == pytest.approx((theirs.low, theirs.high), abs=0.15)


def test_pairing_narrows_the_interval_of_models_that_agree():
    draw = np.random.default_rng(0)
    a = draw.random(1000) < 0.85
    b = a ^ (draw.random(1000) < 0.02)
    _, low, high = paired_bootstrap_drop(a, b)
    _, apart_low, apart_high = paired_bootstrap_drop(a, draw.permutation(b))
    assert high - low < (apart_high - apart_low) / 2


def test_the_interval_of_a_drop_covers_the_truth_about_as_often_as_it_says():
    draw, covered = np.random.default_rng(0), 0
    for seed in range(300):
        a = draw.random(400) < 0.9
        b = np.where(draw.random(400) < 0.9, a, draw.random(400) < 0.7)
        truth = 100 * (0.9 - (0.9 * 0.9 + 0.1 * 0.7))
        _, low, high = paired_bootstrap_drop(a, b, seed)
        covered += low <= truth <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_same_seed_gives_the_same_interval():
    draw = np.random.default_rng(3)
    a, b = draw.random(200) < 0.9, draw.random(200) < 0.8
    assert paired_bootstrap_drop(a, b, 7) == paired_bootstrap_drop(a, b, 7)


times = hnp.arrays(np.float64, 9, elements=st.floats(0.1, 100))


@given(times, times)
def test_a_speed_up_is_the_ratio_of_medians_and_the_inverse_the_other_way(a, b):
    value, low, high = ratio_interval(a, b)
    assert value == pytest.approx(np.median(a) / np.median(b))
    assert 0 < low <= high
    assert ratio_interval(b, a).value == pytest.approx(1 / value)


@given(times, st.floats(0.1, 20))
def test_a_slow_spell_that_hits_both_sides_of_a_round_leaves_no_doubt(a, factor):
    assert ratio_interval(a * factor, a) == pytest.approx((factor, factor, factor))


@given(times, times, st.floats(0.01, 100))
def test_a_speed_up_has_no_unit(a, b, scale):
    assert ratio_interval(a * scale, b * scale) == pytest.approx(ratio_interval(a, b))


def test_the_interval_of_a_speed_up_covers_the_truth_about_as_often_as_it_says():
    draw, covered = np.random.default_rng(0), 0
    for seed in range(100):
        a, b = 6 * draw.lognormal(0, 0.1, 21), draw.lognormal(0, 0.1, 21)
        _, low, high = ratio_interval(a, b, seed)
        covered += low <= 6 <= high
    assert covered >= 88


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy_interval(np.zeros(0)),
        lambda: paired_bootstrap_drop(np.ones(3), np.ones(4)),
        lambda: ratio_interval(np.ones(0), np.ones(0)),
        lambda: ratio_interval(np.ones(3), np.ones(4)),
        lambda: ratio_interval(np.ones(3), np.zeros(3)),
    ],
)
def test_data_without_an_answer_are_refused(call):
    with pytest.raises(ValueError):
        call()


def test_the_medians_interval_holds_the_true_median_in_about_95_of_100_samples():
    rng = np.random.default_rng(0)
    found = [median_interval(rng.exponential(size=40)) for _ in range(1000)]
    covered = np.mean([interval.low <= np.log(2) <= interval.high for interval in found])
    assert 0.93 < covered < 0.99
    assert all(interval.low <= interval.value <= interval.high for interval in found)
    assert median_interval(np.asarray([3.0])) == (3.0, 3.0, 3.0)


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_metrics(lambda chosen: {"mean": values[chosen].mean()}, 400)["mean"]
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (
        pytest.approx(found.value - half, abs=half / 8),
        pytest.approx(found.value + half, abs=half / 8),
    )


def test_a_metric_that_some_resamples_do_not_have_still_has_an_interval():
    found = bootstrap_metrics(lambda chosen: {"r": 1.0 if len(set(chosen)) > 1 else float("nan")}, 2)["r"]
    assert found == (1.0, 1.0, 1.0)
