"""Which packed rows make which optimizer step: a pure function of (seed, step), over any number of shards and sources."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.randomness import generator

WINDOW = 16
"""Shards whose rows are mixed at a time: a rank holds no more of a corpus than twice as many."""
PERIOD = 2**16
"""Rows after which every source has had exactly its share of them, to one in so many."""


class Places(NamedTuple):
    """Rows as they are learnt, in order."""

    epochs: np.ndarray
    """How often all rows of its source have come before, of each."""
    rows: np.ndarray
    """Numbers of the rows."""


class Stream:
    """All rows of one source epoch by epoch, each once, without end.

    An epoch takes the shards in a new order, WINDOW of them at a time, and mixes the rows of those.

    Args:
        first: number of the source's first row.
        rows: rows of each of its shards, shape (shards,), above 0 in sum.
        key: of all that is drawn: the seed, and which source it is.
    """

    def __init__(self, first: int, rows: np.ndarray, key: tuple[int, int]) -> None:
        self.first, self.sizes, self.key = first, np.asarray(rows, dtype=np.int64), key
        self.starts = first + np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes.sum())
        # Two of each: a batch may reach from one into the next.
        self._shards = functools.lru_cache(maxsize=2)(self._ordered)
        self._window = functools.lru_cache(maxsize=2)(self._mixed)

    def _ordered(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (the shards in the order of an epoch, how many rows there are up to the end of each window of them)."""
        order = generator(*self.key, "shards", epoch).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[order])
        return order, np.append(ends[WINDOW - 1 : -1 : WINDOW], ends[-1])

    def _mixed(self, epoch: int, number: int) -> np.ndarray:
        """Returns the rows of one window of shards in their order."""
        shards = self._shards(epoch)[0][number * WINDOW : (number + 1) * WINDOW]
        rows = np.concatenate([self.starts[shard] + np.arange(self.sizes[shard]) for shard in shards])
        return generator(*self.key, "order", epoch, number).permutation(rows)

    def at(self, place: int, count: int) -> Places:
        """Returns `count` rows from `place` on."""
        found: list[tuple[int, np.ndarray]] = []
        while count:
            epoch, within = divmod(place, self.total)
            ends = self._shards(epoch)[1]
            number = int(np.searchsorted(ends, within, side="right"))
            begin = int(ends[number - 1]) if number else 0
            rows = self._window(epoch, number)[within - begin : within - begin + count]
            found.append((epoch, rows))
            place, count = place + len(rows), count - len(rows)
        epochs = np.repeat([epoch for epoch, _ in found], [len(rows) for _, rows in found])
        return Places(epochs, np.concatenate([rows for _, rows in found]))


class RowOrder:
    """Global batches of rows of one or several sources.

    Args:
        sizes: rows of each shard of each source, the rows numbered through in this order.
        weights: share of the rows that each source gives, in any unit.
        batch_size: rows per optimizer step over all ranks.
        seed: of the order.
    """

    def __init__(self, sizes: Sequence[np.ndarray], weights: Sequence[float], batch_size: int, seed: int) -> None:
        firsts = np.cumsum([0, *(int(np.sum(rows)) for rows in sizes)])
        self.streams = [Stream(int(firsts[source]), rows, (seed, source)) for source, rows in enumerate(sizes)]
        self.batch_size = batch_size
        self.total = int(firsts[-1])
        self.quotas = _quotas(np.asarray(weights, dtype=np.float64))
        turns = np.repeat(np.arange(len(sizes), dtype=np.int16), self.quotas)
        self.turns = generator(seed, "mixture").permutation(turns)
        """The source of each row of a period."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many rows are learnt as there are."""
        return -(-self.total // self.batch_size)

    def at(self, step: int) -> Places:
        """Returns the rows of the whole global batch of `step`, arrays of shape (batch_size,)."""
        first = step * self.batch_size
        if len(self.streams) == 1:
            return self.streams[0].at(first, self.batch_size)
        sources = self.turns[np.arange(first, first + self.batch_size) % PERIOD]
        epochs, rows = np.empty((2, self.batch_size), dtype=np.int64)
        periods, within = divmod(first, PERIOD)
        before = np.bincount(self.turns[:within], minlength=len(self.streams)) + periods * self.quotas
        for source in np.unique(sources):
            mine = sources == source
            epochs[mine], rows[mine] = self.streams[source].at(int(before[source]), int(mine.sum()))
        return Places(epochs, rows)

    def micro_batches(self, step: int, rank: int, processes: int, micro: int) -> list[Places]:
        """Returns this rank's micro batches of `step`, arrays of shape (micro,)."""
        epochs, rows = (array.reshape(-1, micro) for array in self.at(step))
        return [Places(epochs[index], rows[index]) for index in range(rank, len(rows), processes)]


def _quotas(weights: np.ndarray) -> np.ndarray:
    """Returns how many of PERIOD rows each source gives, by largest remainders."""
    exact = weights / weights.sum() * PERIOD
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: PERIOD - int(quotas.sum())]] += 1
    return quotas
