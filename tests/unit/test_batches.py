"""Batch plans and packing: seekable, complete, the same for every number of ranks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches import BatchPlan, accumulation_steps, balanced
from engine.data.corpus import Corpus
from engine.data.packing import PackedRows, pack_histogram
from engine.errors import UserError
from engine.randomness import generator
from engine.training.config import TrainConfig
from engine.training.schedule import Schedule


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_holds_every_row_and_only_fills_up_its_last_batch(lengths, batch_size, seed):
    plan = BatchPlan(np.asarray(lengths), batch_size, seed)
    rows = np.concatenate([plan.rows(step) for step in range(plan.steps_per_epoch)])
    assert len(rows) == plan.steps_per_epoch * batch_size
    counts = np.bincount(rows, minlength=len(lengths))
    assert counts.min() >= 1
    assert counts.sum() - len(lengths) == len(rows) - len(lengths)
    if len(lengths) >= batch_size:
        assert counts.max() <= 2


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=120), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_balanced_epochs_are_as_long_and_hold_every_group_equally_often_and_rows_without_a_group_once(groups, seed, epoch):
    groups = np.asarray(groups)
    order = balanced(groups, generator(seed, "order", epoch))
    assert len(order) == len(groups)
    times = np.bincount(order, minlength=len(groups))
    assert (times[groups < 0] == 1).all()
    for name in np.unique(groups[groups >= 0]):
        share = (groups >= 0).sum() / len(np.unique(groups[groups >= 0]))
        assert int(share) <= times[groups == name].sum() <= int(np.ceil(share))
        assert np.ptp(times[groups == name]) <= 1, "rows of a group come equally often, or once more"


def test_a_balanced_step_is_found_without_the_steps_before_and_epochs_differ():
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 50, 300), rng.integers(0, 10, 300).clip(7)
    walked = BatchPlan(lengths, 16, seed=1, groups=groups)
    history = [walked.rows(step) for step in range(3 * walked.steps_per_epoch)]
    assert walked.steps_per_epoch == BatchPlan(lengths, 16, seed=1).steps_per_epoch
    step = 2 * walked.steps_per_epoch + 3
    assert (BatchPlan(lengths, 16, seed=1, groups=groups).rows(step) == history[step]).all()
    first, second = (np.sort(np.concatenate(history[epoch * 19 : (epoch + 1) * 19])) for epoch in (0, 1))
    assert (first != second).any(), "another part of the large group"


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (8, 1), (2, 4), (4, 2), (2, 2)])
def test_ranks_share_out_exactly_the_same_global_batch(ranks, micro):
    plan = BatchPlan(np.arange(1, 101), 8, seed=3)
    for step in (0, 5, 17):
        shares = [plan.micro_batches(step, rank, ranks, micro) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        together = np.sort(np.concatenate([rows for share in shares for rows in share]))
        assert (together == np.sort(plan.rows(step))).all()


def test_a_step_is_found_without_passing_through_the_steps_before():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    walked = BatchPlan(lengths, 16, seed=1)
    history = [walked.rows(step) for step in range(3 * walked.steps_per_epoch)]
    assert (BatchPlan(lengths, 16, seed=1).rows(2 * walked.steps_per_epoch + 3) == history[2 * walked.steps_per_epoch + 3]).all()


def test_rows_of_a_batch_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 200, 5000)
    plan = BatchPlan(lengths, 32, seed=1)
    spread = [np.ptp(lengths[plan.rows(step)]) for step in range(plan.steps_per_epoch)]
    assert np.median(spread) < 10


def test_sizes_that_do_not_divide_are_refused_with_the_numbers():
    assert accumulation_steps(32, 4, 2) == (4, 4)
    with pytest.raises(UserError, match=r"batch_size=30 is not a multiple of micro batch 4 × processes 2 = 8"):
        accumulation_steps(30, 4, 2)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=300), st.integers(0, 3))
@settings(deadline=None)
def test_every_piece_is_packed_exactly_once_in_every_epoch_and_fits(lengths, epoch):
    packed = PackedRows(np.asarray(lengths), 32, seed=9)
    rows = [packed.row(epoch, row) for row in range(len(packed))]
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert max(sum(lengths[piece] for piece in row) for row in rows) <= 32


def test_histogram_packing_fills_rows_of_natural_lengths():
    lengths = np.random.default_rng(0).geometric(1 / 29, 20_000).clip(2, 128)
    counts = np.bincount(lengths, minlength=129)
    rows = sum(rows for _, rows in pack_histogram(counts, 128))
    assert lengths.sum() / (rows * 128) > 0.99


def test_epochs_combine_pieces_differently():
    packed = PackedRows(np.random.default_rng(0).integers(2, 20, 500), 32, seed=9)
    assert [packed.row(0, row) for row in range(20)] != [packed.row(1, row) for row in range(20)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 20))
def test_windows_cover_every_token_once_and_never_cross_documents(lengths, size):
    ends = np.cumsum(lengths)
    windows = Corpus(np.arange(ends[-1]), ends).windows(size)
    covered = np.concatenate([np.arange(first, last) for first, last in windows])
    assert (covered == np.arange(ends[-1])).all()
    assert (windows[:, 1] - windows[:, 0]).max() <= size
    assert set(ends) <= set(windows[:, 1])


def test_schedules_warm_up_to_the_peak_and_end_at_nothing():
    linear = Schedule("linear", 1.0, 10, 100)
    assert linear.at(0) == pytest.approx(0.1)
    assert linear.at(9) == linear.at(10) == 1.0
    assert linear.at(99) == pytest.approx(1 / 90)
    assert Schedule("cosine", 1.0, 0, 100).at(50) == pytest.approx(0.5)
    assert Schedule("constant", 0.3, 5, 100).at(99) == 0.3


def test_wsd_stays_and_then_falls_to_nothing():
    rates = [Schedule("wsd", 0.3, 10, 100, cooldown_steps=20).at(step) for step in range(101)]
    assert rates[9:81] == [0.3] * 72
    assert all(after < before for before, after in itertools.pairwise(rates[80:]))
    assert rates[85] == pytest.approx(0.15), "after a quarter of it, half"
    assert rates[100] == 0.0
    assert Schedule("wsd", 0.3, 0, 10).at(9) == 0.3, "without a part to fall in it stays"
    with pytest.raises(ValueError, match="more than all steps"):
        TrainConfig(steps=10, schedule="wsd", warmup=0.5, cooldown=0.6)
