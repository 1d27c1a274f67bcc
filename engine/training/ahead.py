"""The rows of the next steps are made on another thread, or by other processes, while this one is learnt."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
        """Returns the micro batches of `step` and begins those of the next one, up to step `last`.

        Raises:
            RuntimeError: a process that makes them has died.
        """
        started = time.monotonic()
        if self._coming is None or self._expected != (step, last):
            self._coming = self._by_processes(step, last) if self.workers else self._by_thread(step, last)
        try:
            made, self._expected = next(self._coming), (step + 1, last)
        except ConnectionError as error:  # else it looks as if another rank were lost
            raise RuntimeError(
                "a process that makes batches has died: look for an out-of-memory kill in the system's log"
            ) from error
        self.waited += time.monotonic() - started
        if isinstance(made, UserError):
            raise made
        return made

    def _by_thread(self, step: int, last: int) -> Iterator[Made]:
        coming = self._pool.submit(self._pinned, step)
        for following in range(step + 1, last + 2):
            made = coming.result()
            if following <= last:
                coming = self._pool.submit(self._pinned, following)
            yield made

    def _pinned(self, step: int) -> Made:
        made = self.make(step)
        if self.pin:
            return [
                {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in part.items()} for part in made
            ]
        return made

    def _by_processes(self, step: int, last: int) -> Iterator[Made | UserError]:
        return iter(
            DataLoader(
                _Steps(self.make),
                batch_size=None,
                sampler=range(step, last + 1),
                num_workers=self.workers,
                pin_memory=self.pin,
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


class _Steps(Dataset[Made | UserError]):
    """Micro batches by step, as DataLoader asks for them; a user's mistake is handed over as it is, without its traceback."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> Made | UserError:
        try:
            return self.make(step)
        except UserError as error:
            return error
