"""Which rows make which optimizer step: a pure function of (seed, step), seekable, equal in number on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.randomness import generator

Batch = dict[str, Any]
"""Columns of a micro batch: tensors, and lists of what is no number."""
BUCKET_BATCHES = 50
"""Rows are sorted by length within windows of this many batches: little padding, still well mixed."""
EVALUATION_BATCH = 64
"""Rows per forward pass without gradients."""


def accumulation_steps(batch_size: int, micro_batch_size: int | None, processes: int) -> tuple[int, int]:
    """Returns (micro batch size, gradient accumulation steps) such that micro × accumulation × processes = batch_size.

    Raises:
        UserError: the numbers do not divide.
    """
    micro = micro_batch_size or max(1, batch_size // processes)
    if batch_size % (micro * processes):
        raise UserError(
            f"train.batch_size={batch_size} is not a multiple of micro batch {micro} × processes {processes} "
            f"= {micro * processes}: change train.batch_size or train.micro_batch_size"
        )
    return micro, batch_size // (micro * processes)


def most_processes(batch_size: int, micro_batch_size: int | None, limit: int) -> int:
    """Returns the largest number of processes up to `limit` that share a batch evenly; `limit` where none does."""
    shares = batch_size // micro_batch_size if micro_batch_size else batch_size
    fits = [count for count in range(1, limit + 1) if shares % count == 0 and batch_size % (micro_batch_size or 1) == 0]
    return max(fits, default=limit)


def batches_by_length(lengths: Sequence[int] | np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts row numbers, sorted by length, into batches of at most `size`: least padding."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def batches_of_tokens(lengths: Sequence[int] | np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cuts row numbers, sorted by length, into batches of at most `tokens` tokens, padding included, and one row at least."""
    lengths_N = np.asarray(lengths)
    order = np.argsort(lengths_N, kind="stable")
    batches, start = [], 0
    while start < len(order):
        # Rows grow, so that the last one of a batch says how wide it is.
        sizes = lengths_N[order[start : start + tokens]] * np.arange(1, min(tokens, len(order) - start) + 1)
        count = max(1, int(np.searchsorted(sizes, tokens, side="right")))
        batches.append(order[start : start + count])
        start += count
    return batches


def balanced(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns as many row numbers as there are, in no order: equally many of each group, or one more; of -1 each row once.

    Of a group with more rows than that a random part comes; of one with fewer each comes again, equally often or once more.
    """
    names = rng.permutation(np.unique(groups[groups >= 0]))
    drawn = [np.flatnonzero(groups < 0)]
    for turn, name in enumerate(names):
        size = (int((groups >= 0).sum()) - turn + len(names) - 1) // len(names)
        drawn.append(np.resize(rng.permutation(np.flatnonzero(groups == name)), size))
    return np.concatenate(drawn)


class BatchPlan:
    """Shuffled global batches of rows of similar length.

    Every epoch is a new permutation in which each row comes once, or each group equally often; the last batch of an epoch is
    filled up from the top of the same permutation, so that all batches are full.

    Args:
        lengths: tokens of each row, shape (rows,).
        batch_size: rows per optimizer step over all ranks.
        seed: of the shuffling.
        groups: the group of each row, shape (rows,), of which every epoch draws equally many rows, or one more; -1: each such row
            once. An epoch has as many rows as without. None: each row once.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, groups: np.ndarray | None = None) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.groups = groups
        self.steps_per_epoch = -(-len(self.lengths) // batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """Returns (epoch, batch within the epoch) of an optimizer step."""
        return divmod(step, self.steps_per_epoch)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one plan lives as long as its training
    def _epoch(self, epoch: int) -> np.ndarray:
        rng = generator(self.seed, "order", epoch)
        kind = np.int32 if len(self.lengths) < 2**31 else np.int64
        every = np.arange(len(self.lengths), dtype=kind)
        order = rng.permutation(every if self.groups is None else balanced(self.groups, rng).astype(kind))
        order = np.resize(order, self.steps_per_epoch * self.batch_size)
        window = BUCKET_BATCHES * self.batch_size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = order.reshape(self.steps_per_epoch, self.batch_size)
        return batches[rng.permutation(self.steps_per_epoch)]

    def rows(self, step: int) -> np.ndarray:
        """Returns the row numbers of the whole global batch of `step`, shape (batch_size,)."""
        epoch, batch = self.position(step)
        return self._epoch(epoch)[batch]

    def micro_batches(self, step: int, rank: int, processes: int, micro: int) -> list[np.ndarray]:
        """Returns this rank's micro batches of `step`: row numbers, each of shape (micro,).

        Neighbouring micro batches go to different ranks, so that at each moment all ranks work on similar lengths.
        """
        chunks = self.rows(step).reshape(-1, micro)
        return [chunks[index] for index in range(rank, len(chunks), processes)]
