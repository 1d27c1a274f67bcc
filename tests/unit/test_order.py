"""The order of rows: every row once an epoch, found at once, whatever the number of shards and sources."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.order import PERIOD, WINDOW, RowOrder

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=11).filter(any)


def rows_of(order, steps):
    places = [order.at(step) for step in steps]
    return np.concatenate([place.epochs for place in places]), np.concatenate([place.rows for place in places])


@given(SIZES, st.integers(1, 17), st.integers(0, 9))
def test_every_row_comes_once_an_epoch(sizes, batch, seed):
    order = RowOrder([np.asarray(sizes)], [1.0], batch, seed)
    epochs, rows = rows_of(order, range(3 * order.steps_per_epoch + 1))
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(sum(sizes)))
    assert (np.diff(epochs) >= 0).all()


@given(SIZES, st.integers(1, 17))
def test_a_step_is_found_without_those_before(sizes, batch):
    walked = RowOrder([np.asarray(sizes), np.asarray([5])], [3.0, 1.0], batch, 1)
    history = [walked.at(step) for step in range(40)]
    for step in (39, 7, 23):
        fresh = RowOrder([np.asarray(sizes), np.asarray([5])], [3.0, 1.0], batch, 1).at(step)
        assert all((one == other).all() for one, other in zip(fresh, history[step], strict=True))


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (2, 4), (4, 1), (2, 2)])
def test_ranks_share_the_rows_of_a_step_whatever_their_number(processes, micro):
    order = RowOrder([np.asarray([40, 3, 17])], [1.0], 8, 1)
    for step in (0, 5, 9):
        parts = [order.micro_batches(step, rank, processes, micro) for rank in range(processes)]
        assert all(len(places.rows) == micro for rank in parts for places in rank)
        found = np.concatenate([places.rows for rank in parts for places in rank])
        assert sorted(found) == sorted(order.at(step).rows)


def test_an_epoch_mixes_the_rows_of_a_few_shards_in_an_order_of_its_own():
    count = 5 * WINDOW
    sizes = np.full(count, 50)
    order = RowOrder([sizes], [1.0], 50, 1)
    shard_of = np.repeat(np.arange(count), sizes)
    steps = (range(count), range(count, 2 * count))
    epochs = [shard_of[rows_of(order, part)[1]].reshape(5, WINDOW * 50) for part in steps]
    windows = [[sorted(set(part)) for part in epoch] for epoch in epochs]
    assert all(len(window) == WINDOW for epoch in windows for window in epoch)
    assert windows[0] != windows[1]
    assert all(len(set(part[:50])) > WINDOW * 0.8 for epoch in epochs for part in epoch)
    alone = RowOrder([np.asarray([200])], [1.0], 50, 1)
    assert rows_of(alone, range(4))[1].tolist() != rows_of(alone, range(4, 8))[1].tolist()
    assert (rows_of(order, steps[0])[1] != rows_of(RowOrder([sizes], [1.0], 50, 2), steps[0])[1]).any()


def test_sources_give_the_shares_that_were_asked_for():
    sizes, weights = [np.asarray([30, 20]), np.asarray([400]), np.asarray([7])], [1.0, 2.5, 0.5]
    order = RowOrder(sizes, weights, 64, 3)
    epochs, rows = rows_of(order, range(2 * PERIOD // 64))
    source = np.searchsorted(np.cumsum([50, 400, 7]), rows, side="right")
    counts = np.bincount(source)
    np.testing.assert_allclose(counts / len(rows), np.asarray(weights) / 4, atol=1 / PERIOD)
    assert (np.bincount(source[:PERIOD]) * 2 == counts).all()
    for number, (first, total) in enumerate(((0, 50), (50, 400), (450, 7))):
        mine, when = rows[source == number], epochs[source == number]
        assert (np.diff(when) >= 0).all()
        for epoch in range(when[-1]):
            assert sorted(mine[when == epoch]) == list(range(first, first + total))
    near = np.bincount(source[:640], minlength=3) / 640
    np.testing.assert_allclose(near, np.asarray(weights) / 4, atol=0.06)


def test_the_order_of_a_billion_documents_takes_the_memory_of_a_few_shards():
    """2^40 tokens in shards of 2^26, rows of 2,048: see docs/scale.md."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(33_000, 34_000, 2**40 // 2**26)
    assert sizes.sum() > 5 * 10**8
    tracemalloc.start()
    order = RowOrder([sizes], [1.0], 8192, 1)
    last = order.steps_per_epoch - 1
    seen = [order.at(step).rows for step in (0, 1, last // 3, last // 2, last - 1, last)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(np.concatenate(seen[:-1]))) == 5 * 8192
    assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MiB"
    # All rows of the first windows of an epoch are there once.
    stream = order.streams[0]
    windows = [stream._window(0, number) for number in range(3)]
    shards = stream._shards(0)[0][: 3 * WINDOW]
    expected = np.concatenate([stream.starts[shard] + np.arange(sizes[shard]) for shard in shards])
    assert (np.sort(np.concatenate(windows)) == np.sort(expected)).all()
