"""The queue of a model: bounded, and merging what waits into one batch where the model's configuration says so."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.serving.protocol import Arrays, ModelSpec, RequestError
from export.serving.triton import VERSION

PHASES = ("compute_input", "compute_infer", "compute_output")


@dataclass
class Duration:
    """How often something happened and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Counts `count` events that took `ns` each."""
        self.count += count
        self.ns += ns * count


@dataclass
class Statistics:
    """The statistics extension of the protocol, counted as Triton counts."""

    last_inference: int = 0
    """Milliseconds since the epoch."""
    inferences: int = 0
    executions: int = 0
    requests: dict[str, Duration] = field(
        default_factory=lambda: {name: Duration() for name in ("success", "fail", "queue", *PHASES)}
    )
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)

    def record(self, works: list[Work], started: int, phases: tuple[int, int, int]) -> None:
        """Counts one execution of a batch.

        Args:
            started: when it started, in ns.
            phases: ns spent gathering inputs, computing, and splitting outputs.
        """
        rows = sum(work.rows for work in works)
        self.last_inference = time.time_ns() // 1_000_000
        self.inferences += rows
        self.executions += 1
        batch = self.batches.setdefault(rows, {name: Duration() for name in PHASES})
        for name, ns in zip(PHASES, phases, strict=True):
            batch[name].add(ns)
            self.requests[name].add(ns, len(works))
        for work in works:
            self.requests["queue"].add(started - work.arrived)
            self.requests["success"].add(started + sum(phases) - work.arrived)

    def as_json(self, name: str) -> dict[str, Any]:
        """Returns the statistics of model `name` as the protocol has them."""

        def durations(values: dict[str, Duration]) -> dict[str, Any]:
            return {key: {"count": value.count, "ns": value.ns} for key, value in values.items()}

        return {
            "name": name,
            "version": VERSION,
            "last_inference": self.last_inference,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": durations(self.requests),
            "batch_stats": [{"batch_size": rows, **durations(phases)} for rows, phases in sorted(dict(self.batches).items())],
        }


@dataclass
class Work:
    """The input of one request and when it arrived (ns)."""

    arrays: Arrays
    arrived: int

    @property
    def rows(self) -> int:
        """Its batch size."""
        return len(next(iter(self.arrays.values())))


class ServedModel:
    """One model as it is served: its queue and its statistics.

    Args:
        spec: what it takes and gives; whether requests are merged.
        compute: arrays in, arrays out, for a whole batch; runs in `executor`.
        executor: of one thread: a batch has all cores for itself.
        max_queue: requests that may wait.
    """

    def __init__(self, spec: ModelSpec, compute: Callable[[Arrays], Arrays], executor: Executor, max_queue: int) -> None:
        self.spec, self.compute, self.executor, self.max_queue = spec, compute, executor, max_queue
        self.statistics = Statistics()
        self.queue: deque[tuple[Work, asyncio.Future[Arrays]]] = deque()
        self.arrival = asyncio.Event()

    async def infer(self, arrays: Arrays) -> Arrays:
        """Answers one request.

        Raises:
            RequestError: 503, the queue is full.
        """
        work = Work(arrays, time.perf_counter_ns())
        try:
            if len(self.queue) >= self.max_queue:
                raise RequestError(f"model '{self.spec.name}' is busy: {self.max_queue} requests wait already; try again", 503)
            answer = asyncio.get_running_loop().create_future()
            self.queue.append((work, answer))
            self.arrival.set()
            return await answer
        except BaseException:
            self.statistics.requests["fail"].add(time.perf_counter_ns() - work.arrived)
            raise

    def refuse_waiting(self) -> None:
        """Refuses every request that waits: the server stops at once."""
        while self.queue:
            _, answer = self.queue.popleft()
            if not answer.done():
                answer.set_exception(RequestError("the server stops", 503))

    async def run(self) -> None:
        """Works off the queue until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next()
            try:
                outputs = await loop.run_in_executor(self.executor, self.execute, [work for work, _ in batch])
            except Exception as error:  # it belongs to the requests, not to the queue
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), arrays in zip(batch, outputs, strict=True):
                if not answer.done():
                    answer.set_result(arrays)

    async def _next(self) -> list[tuple[Work, asyncio.Future[Arrays]]]:
        """Waits for work; returns one request, or as many waiting ones as fit into one batch."""
        batch: list[tuple[Work, asyncio.Future[Arrays]]] = []
        while not batch:
            while not self.queue:
                self.arrival.clear()
                await self.arrival.wait()
            if self.spec.merges and self.spec.delay:
                await self._linger()
            rows = 0
            while self.queue and (not batch or (self.spec.merges and rows + self.queue[0][0].rows <= self.spec.max_batch)):
                work, answer = self.queue.popleft()
                if not answer.done():  # else its client has gone
                    batch.append((work, answer))
                    rows += work.rows
        return batch

    async def _linger(self) -> None:
        """Waits until a full batch is there or the oldest request has waited for the delay."""
        deadline = self.queue[0][0].arrived / 1e9 + self.spec.delay
        while sum(work.rows for work, _ in self.queue) < self.spec.max_batch:
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            self.arrival.clear()
            try:
                await asyncio.wait_for(self.arrival.wait(), left)
            except TimeoutError:
                return

    def execute(self, works: list[Work]) -> list[Arrays]:
        """Computes one batch of requests and counts it; called in the executor's thread only."""
        started = time.perf_counter_ns()
        first = works[0].arrays
        merged = first if len(works) == 1 else {name: np.concatenate([work.arrays[name] for work in works]) for name in first}
        gathered = time.perf_counter_ns()
        outputs = self.compute(merged)
        computed = time.perf_counter_ns()
        ends = np.cumsum([work.rows for work in works])
        answers = [
            {name: array[end - work.rows : end] for name, array in outputs.items()} for work, end in zip(works, ends, strict=True)
        ]
        done = time.perf_counter_ns()
        self.statistics.record(works, started, (gathered - started, computed - gathered, done - computed))
        return answers

    def execute_now(self, arrays: Arrays) -> Arrays:
        """Computes for another model that runs in the executor's thread, past the queue."""
        return self.execute([Work(arrays, time.perf_counter_ns())])[0]
