"""Figures of classes and numbers: the same as those of the reference libraries, and defined where those are not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import classification, regression

from engine.answers._metrics import best_threshold, class_counts, f1_macro, label_counts, matthews, pearson, ranks, spearman

CLASSES = 4
PAIRS = st.integers(1, 30).flatmap(
    lambda rows: st.tuples(*[st.lists(st.integers(0, CLASSES - 1), min_size=rows, max_size=rows)] * 2)
)
NUMBERS = st.lists(
    st.tuples(st.floats(-1e150, 1e150), st.floats(-1e150, 1e150)) | st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    min_size=1,
    max_size=30,
)


def counted(predicted, truth):
    """(predicted and true, predicted, true) of each class, one row after the other."""
    return [
        (
            sum(a == c == b for a, b in zip(predicted, truth, strict=True)),
            sum(a == c for a in predicted),
            sum(b == c for b in truth),
        )
        for c in range(CLASSES)
    ]


@given(PAIRS)
def test_counts_and_f1_of_classes_are_those_of_counting_row_by_row(pair):
    predicted, truth = map(np.array, pair)
    counts = class_counts(predicted, truth, CLASSES)
    assert list(zip(*counts, strict=True)) == counted(*pair)
    expected = [2 * both / (own + true) if own + true else 0.0 for both, own, true in counted(*pair)]
    np.testing.assert_allclose(counts.f1, expected, rtol=1e-12)
    assert counts.f1_micro == pytest.approx((predicted == truth).mean(), rel=1e-12), "one class a row: micro F1 is accuracy"


@given(PAIRS)
def test_matthews_is_the_correlation_of_one_hot_columns_and_0_where_a_side_is_constant(pair):
    own, true = (np.eye(CLASSES)[list(side)] for side in pair)
    covariance = lambda a, b: ((a - a.mean(0)) * (b - b.mean(0))).sum()  # noqa: E731
    spread = covariance(own, own) * covariance(true, true)
    expected = covariance(own, true) / np.sqrt(spread) if spread > 1e-9 else 0.0
    assert matthews(class_counts(*map(np.array, pair), CLASSES)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_classes_are_those_of_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, 200)
    predicted = np.where(rng.random(200) < 0.6, truth, rng.integers(0, 3, 200))
    theirs = torch.from_numpy(predicted), torch.from_numpy(truth)
    counts = class_counts(predicted, truth, 3)
    assert matthews(counts) == pytest.approx(float(classification.multiclass_matthews_corrcoef(*theirs, num_classes=3)), abs=1e-6)
    each = classification.multiclass_f1_score(*theirs, num_classes=3, average="none")
    np.testing.assert_allclose(counts.f1, each, atol=1e-6)
    assert f1_macro(predicted, truth, 3) == pytest.approx(float(each.mean()), abs=1e-6)
    two = [torch.from_numpy(side % 2) for side in (predicted, truth)]
    assert class_counts(predicted % 2, truth % 2, 2).f1[1] == pytest.approx(float(classification.binary_f1_score(*two)), abs=1e-6)
    table = counts.table(["a", "b", "c"])
    precision = classification.multiclass_precision(*theirs, num_classes=3, average="none")
    recall = classification.multiclass_recall(*theirs, num_classes=3, average="none")
    np.testing.assert_allclose([row["precision"] for row in table.values()], 100 * precision.numpy(), atol=1e-4)
    np.testing.assert_allclose([row["recall"] for row in table.values()], 100 * recall.numpy(), atol=1e-4)
    assert [row["rows"] for row in table.values()] == np.bincount(truth).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_f1_of_labels_is_that_of_torchmetrics(seed):
    rng = np.random.default_rng(seed)
    own, true = rng.random((60, 5)) < 0.3, rng.random((60, 5)) < [0.0, 0.1, 0.3, 0.5, 0.9]
    counts, theirs = label_counts(own, true), (torch.from_numpy(own).int(), torch.from_numpy(true).int())
    of = lambda average: classification.multilabel_f1_score(*theirs, num_labels=5, average=average)  # noqa: E731
    assert counts.f1_micro == pytest.approx(float(of("micro")), abs=1e-6)
    assert counts.f1.mean() == pytest.approx(float(of("macro")), abs=1e-6)
    np.testing.assert_allclose(counts.f1, of("none"), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_those_of_scipy_to_the_last_digits_and_of_torchmetrics(seed, ties):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    own, other = rng.normal(size=(2, 100))
    other += own
    if ties:
        own, other = own.round(), other.round()
    assert pearson(own, other) == pytest.approx(stats.pearsonr(own, other).statistic, rel=1e-13)
    assert spearman(own, other) == pytest.approx(stats.spearmanr(own, other).statistic, rel=1e-13)
    np.testing.assert_array_equal(ranks(own), stats.rankdata(own))
    theirs = torch.from_numpy(own), torch.from_numpy(other)
    assert pearson(own, other) == pytest.approx(float(regression.pearson_corrcoef(*theirs)), abs=1e-9)
    assert spearman(own, other) == pytest.approx(float(regression.spearman_corrcoef(*theirs)), abs=1e-5)


@given(NUMBERS)
def test_correlations_are_defined_symmetric_and_between_minus_one_and_one(pairs):
    own, other = np.array(pairs, dtype=np.float64).T
    for correlation in (pearson, spearman):
        value = correlation(own, other)
        assert -1 <= value <= 1
        assert value == pytest.approx(correlation(other, own), abs=1e-9)
        if np.ptp(own) > 0:
            assert correlation(own, own) == pytest.approx(1.0, abs=1e-9)


@given(st.floats(-1e6, 1e6), NUMBERS)
def test_constant_predictions_have_no_correlation_and_no_nan(value, pairs):
    other = np.array(pairs, dtype=np.float64)[:, 0]
    for correlation in (pearson, spearman):
        assert correlation(np.full(len(other), value), other) == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12))
def test_no_threshold_has_a_larger_f1_than_the_chosen_one(rows):
    score, truth = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    if not truth.any():
        return

    def f1(threshold):
        return label_counts((score >= threshold)[:, None], truth[:, None]).f1[0]

    best = best_threshold(score, truth)
    assert f1(best) == pytest.approx(max(f1(threshold) for threshold in (*score, *(score + 1e-3))), abs=1e-12)
    if score.min() > 0:
        assert best not in score, "a score that moves a little stays on its side"


def test_of_equally_good_thresholds_the_one_nearest_to_a_half_is_taken():
    assert best_threshold(np.array([0.9, 0.1]), np.array([True, False])) == 0.5
    assert best_threshold(np.array([0.2, 0.1]), np.array([True, True])) == 0.05
