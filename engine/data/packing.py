"""Packing: documents share rows of a fixed length without ever seeing each other.

The number of rows and their composition by lengths depend only on the histogram of lengths, as in longest-pack-first
histogram packing (Krell et al. 2021, arXiv:2107.02027). An epoch then only permutes which piece fills which place, so that
any row of any epoch is found at once and the number of steps is known before training.
"""

from __future__ import annotations

import functools

import numpy as np

from engine.randomness import generator


def pack_histogram(counts: np.ndarray, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Packs pieces into rows, longest first, each into the fullest row that still has room.

    Args:
        counts: counts[n] = number of pieces of n tokens, shape (capacity + 1,).
        capacity: tokens per row.

    Returns:
        (lengths in the row, number of such rows) pairs; every piece is in exactly one row.
    """
    # groups[space] = {lengths: number of rows} of rows with `space` tokens left; bit `space` of open_spaces: there are any.
    groups: dict[int, dict[tuple[int, ...], int]] = {}
    open_spaces = 0
    for length in range(capacity, 0, -1):
        left = int(counts[length])
        while left:
            fitting = open_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                group = groups[space]
                lengths, rows = next(iter(group.items()))
                used = min(rows, left)
                if used < rows:
                    group[lengths] = rows - used
                else:
                    del group[lengths]
                    open_spaces ^= 0 if group else 1 << space
                space, lengths, left = space - length, (*lengths, length), left - used
            else:
                # As few new rows as can take all that is left; the loop then fills them.
                used = -(-left // (capacity // length))
                space, lengths, left = capacity - length, (length,), left - used
            group = groups.setdefault(space, {})
            group[lengths] = group.get(lengths, 0) + used
            open_spaces |= 1 << space
    return [(lengths, rows) for space in sorted(groups) for lengths, rows in groups[space].items()]


class PackedRows:
    """Rows of packed pieces, as a seekable function of (epoch, row).

    Args:
        lengths: tokens of each piece, each between 1 and capacity, shape (pieces,).
        capacity: tokens per row.
        seed: of the assignment of pieces to places.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self.seed = seed
        lengths = np.asarray(lengths)
        counts = np.bincount(lengths, minlength=capacity + 1)
        order = np.argsort(lengths.astype(np.min_scalar_type(capacity)), kind="stable")
        by_length = np.split(order.astype(np.min_scalar_type(len(lengths))), np.cumsum(counts)[:-1])
        self._pools = {int(n): by_length[n] for n in np.flatnonzero(counts)}
        self.patterns = pack_histogram(counts, capacity)
        self._first_row = np.cumsum([0] + [rows for _, rows in self.patterns])
        # Where each place of each pattern starts in the pool of its length.
        taken: dict[int, int] = {}
        self._starts: list[list[int]] = []
        for pattern, rows in self.patterns:
            starts = []
            for n in pattern:
                starts.append(taken.get(n, 0))
                taken[n] = starts[-1] + rows
            self._starts.append(starts)
        self.tokens = int(lengths.sum())
        self._pieces = functools.lru_cache(maxsize=2)(self._permuted)  # a batch may reach into the next epoch

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def _permuted(self, epoch: int) -> dict[int, np.ndarray]:
        return {n: generator(self.seed, "pack", epoch, n).permutation(pool) for n, pool in self._pools.items()}

    def row(self, epoch: int, row: int) -> list[int]:
        """Returns the numbers of the pieces in `row` of `epoch`, in order."""
        pattern = int(np.searchsorted(self._first_row, row, side="right")) - 1
        offset = row - int(self._first_row[pattern])
        pieces = self._pieces(epoch)
        lengths = self.patterns[pattern][0]
        return [int(pieces[n][start + offset]) for n, start in zip(lengths, self._starts[pattern], strict=True)]
