"""Latency side by side: every candidate runs the same inputs in turn, so that a slow spell of the machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.answers import Answers, Arrays, Row, Run
from engine.answers._batches import Recorder
from engine.cpu import instructions
from engine.intervals import median_interval

Calls = list[tuple[str, Arrays]]
"""What answering one row asks of a model: (graph, inputs), in order."""

if TYPE_CHECKING:
    from engine.tasks import Task

INPUTS_PER_ROUND = 25
"""Inputs that one round measures: a few hundred milliseconds, short enough that a disturbance spoils few rounds."""
WARM_UP_SECONDS = 0.03
"""A candidate runs unmeasured for so long when its turn comes: threads of the one before it have stopped spinning by then."""
BATCHES = (1, 8, 32)
LENGTHS = (16, 64, 128)


@dataclass(frozen=True)
class Candidate:
    """One way to run a model."""

    name: str
    stage: str
    runtime: str
    precision: str
    run: Callable[[Any], Any]
    """Takes one of the inputs of `measure`."""
    inputs: Sequence[Any] | None = None
    """Its own form of those inputs, one for each, where another tokenizer reads the same texts."""


def measure(candidates: list[Candidate], inputs: Sequence[Any], rounds: int) -> dict[str, np.ndarray]:
    """Times every candidate over every input.

    Args:
        inputs: what a call takes; a round measures the next INPUTS_PER_ROUND of them with every candidate in turn.
        rounds: how many.

    Returns:
        {name: mean milliseconds of a call in each round, shape (rounds,)}; entry r of all candidates is over the same inputs.
    """
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    size = min(INPUTS_PER_ROUND, len(inputs))
    for turn in range(rounds):
        places = [(turn * size + offset) % len(inputs) for offset in range(size)]
        shift = turn % len(candidates)
        for candidate in candidates[shift:] + candidates[:shift]:
            chosen = [(candidate.inputs or inputs)[place] for place in places]
            warm = time.perf_counter() + WARM_UP_SECONDS
            while time.perf_counter() < warm:
                candidate.run(chosen[0])
            started = time.perf_counter()
            for arrays in chosen:
                candidate.run(arrays)
            times[candidate.name].append((time.perf_counter() - started) / size * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}


def summary(times_R: np.ndarray) -> dict[str, float]:
    """Returns the median of the rounds with its 95 % interval (low, high) and their 95th percentile, in milliseconds."""
    median = median_interval(times_R)
    return {"median_ms": median.value, "low": median.low, "high": median.high, "p95_ms": float(np.percentile(times_R, 95))}


def calls_of(answers: Answers, run: Run, row: Row) -> Calls:
    """Returns what answering one row asks of a model; other models are then asked the same."""
    recorder = Recorder(run)
    answers.answer(recorder, [row])
    return [(graph, arrays) for graph, arrays, _ in recorder.calls]


def replay(run: Run) -> Callable[[Calls], None]:
    """Returns a function that makes the calls of one row: what a candidate's latency is measured with."""

    def make(calls: Calls) -> None:
        for graph, arrays in calls:
            run(graph, arrays)

    return make


def torch_candidate(stage: str, directory: Path, task: Task, threads: int, inputs: Sequence[Any] | None = None) -> Candidate:
    """Returns a model in PyTorch fp32, eager mode, with the attention that is faster on this hardware."""
    import torch

    from engine.evaluate import torch_run
    from engine.models.fitting import load_finished

    torch.set_num_threads(threads)
    run = replay(torch_run(load_finished(directory, task).eval(), task))

    def without_gradients(calls: Calls) -> None:
        with torch.inference_mode():
            run(calls)

    return Candidate(f"{stage}/torch-fp32", stage, "torch", "fp32", without_gradients, inputs)


def benchmark_bundle(path: Path, threads: int = 2, rounds: int = 20) -> dict[str, Any]:
    """Measures a bundle's ONNX Runtime engine.

    Args:
        threads: of one call.
        rounds: passes; each measures up to INPUTS_PER_ROUND golden inputs, and every batch size and length once.

    Returns:
        {"threads", "instructions" of this CPU, "rounds", "batch_1": over the golden inputs at their natural lengths, with "text"
        (tokenizing included), "batches": {"8×64": {…, "rows_per_second"}}}.
    """
    from export.serving.bundle import Bundle

    bundle = Bundle.open(path, threads=threads)
    rows = [golden.row for golden in bundle.golden()]
    inputs = [calls_of(bundle.answers, bundle.run, row) for row in rows]
    engine = Candidate("engine", bundle.manifest.name, "onnxruntime", "", replay(bundle.run))
    times = measure([engine], inputs, rounds)["engine"]
    texts = []
    for row in (rows * (1 + rounds * INPUTS_PER_ROUND // len(rows)))[: rounds * INPUTS_PER_ROUND]:
        started = time.perf_counter()
        bundle.predict([row])
        texts.append((time.perf_counter() - started) * 1e3)
    batches = {}
    for graph, loaded in bundle.engines.items():
        one = f"{graph} " if len(bundle.engines) > 1 else ""
        for batch in (size for size in BATCHES if size <= bundle.manifest.max_batch):
            for length in (size for size in LENGTHS if size <= bundle.manifest.max_length):
                calls = [(graph, {name: np.ones((batch, length), dtype=np.int64) for name in loaded.inputs})]
                found = summary(measure([engine], [calls], rounds)["engine"])
                batches[f"{one}{batch}×{length}"] = {**found, "rows_per_second": batch / found["median_ms"] * 1e3}
    return {
        "threads": threads,
        "instructions": instructions(),
        "rounds": rounds,
        "batch_1": {**summary(times), "text": summary(np.asarray(texts))},
        "batches": batches,
    }
