"""The rows of the next step are made on another thread while this one is learnt."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from engine.data.batches import Batch

Made = list[Batch]


class Ahead:
    """Micro batches by step, the next ones of which are there already when they are asked for in order.

    Args:
        make: returns the micro batches of a step: a pure function, called on another thread.
        pin: put their tensors where a GPU can fetch them beside its work.
    """

    def __init__(self, make: Callable[[int], Made], pin: bool) -> None:
        self.make, self.pin = make, pin
        self.waited = 0.0
        """Seconds that callers have waited."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._step: int | None = None
        self._next: Future[Made] | None = None

    def at(self, step: int, last: int) -> Made:
        """Returns the micro batches of `step` and begins those of the next one, up to step `last`."""
        started = time.monotonic()
        ours = self._next if self._next is not None and self._step == step else self._pool.submit(self._made, step)
        made = ours.result()
        self.waited += time.monotonic() - started
        self._step, self._next = step + 1, self._pool.submit(self._made, step + 1) if step < last else None
        return made

    def _made(self, step: int) -> Made:
        made = self.make(step)
        if self.pin:
            return [
                {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in part.items()} for part in made
            ]
        return made

    def close(self) -> None:
        """Waits for what is being made, and makes no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
