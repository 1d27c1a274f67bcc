"""The rows of the next steps are made on another thread, or by other processes, while this one is learnt."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.batches import Batch
from engine.errors import UserError

Made = list[Batch]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a rank to stop, and all that it has started: it still needs its batches until it has."""


class Ahead:
    """Micro batches by step, the next ones of which are there already when they are asked for in order.

    A thread is enough beside a CPU's long steps. It holds Python's global lock, though, while a GPU waits for its next kernels:
    there, other processes make the rows, copies of this one that share its memory.

    Args:
        make: returns the micro batches of a step: a pure function.
        pin: put their tensors where a GPU can fetch them beside its work.
        workers: how many processes make them; 0: a thread.
    """

    def __init__(self, make: Callable[[int], Made], pin: bool, workers: int = 0) -> None:
        self.make, self.pin, self.workers = make, pin, workers
        self.waited = 0.0
        """Seconds that callers have waited."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._closed = mmap.mmap(-1, 1)
        """A byte that is shared with the processes: not 0 when they are not needed any more."""
        self._expected: tuple[int, int] | None = None
        self._coming: Iterator[Made | UserError] | None = None

    def at(self, step: int, last: int) -> Made:
        """Returns the micro batches of `step` and begins those of the next one, up to step `last`."""
        started = time.monotonic()
        if self._coming is None or self._expected != (step, last):
            self._coming = self._in_order(self._sent(step, last) if self.workers else map(self._made, range(step, last + 1)))
        made, self._expected = next(self._coming), (step + 1, last)
        self.waited += time.monotonic() - started
        if isinstance(made, UserError):
            raise made
        return made

    def _in_order(self, source: Iterator[Any]) -> Iterator[Made | UserError]:
        coming = self._pool.submit(self._taken, source)
        while (made := coming.result()) is not None:
            coming = self._pool.submit(self._taken, source)
            yield made

    def _taken(self, source: Iterator[Any]) -> Made | UserError | None:
        made = next(source, None)
        if made is None or isinstance(made, UserError):
            return made
        return [
            {key: self._tensor(value) if isinstance(value, np.ndarray) else value for key, value in part.items()} for part in made
        ]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin else tensor

    def _made(self, step: int) -> Any:
        """Returns the micro batches of a step, arrays in place of tensors: they go from process to process through a pipe, where
        tensors want sockets and shared memory, of which a container has little."""
        try:
            made = self.make(step)
        except UserError as error:
            return error
        return [{key: value.numpy() if torch.is_tensor(value) else value for key, value in part.items()} for part in made]

    def _sent(self, step: int, last: int) -> Iterator[Any]:
        return iter(
            DataLoader(
                _Steps(self._made),
                batch_size=None,
                sampler=range(step, last + 1),
                num_workers=self.workers,
                collate_fn=_as_it_is,
                multiprocessing_context="fork",  # a corpus is not copied, only its pages that somebody writes to
                worker_init_fn=self._stay,
                generator=torch.Generator(),  # else it draws from the one that dropout comes from
            )
        )

    def _stay(self, worker: int) -> None:
        def stop(number: int, frame: Any) -> None:
            if self._closed[0]:
                os._exit(0)

        for number in STOPS:
            signal.signal(number, stop)

    def close(self) -> None:
        """Waits for what is being made, and makes no more."""
        self._closed[0] = 1
        self._coming = None
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Steps(Dataset[Any]):
    """Micro batches by step, as DataLoader asks for them."""

    def __init__(self, made: Callable[[int], Any]) -> None:
        self.made = made

    def __getitem__(self, step: int) -> Any:
        return self.made(step)


def _as_it_is(made: Any) -> Any:
    return made
