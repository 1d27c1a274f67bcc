"""Evaluation: every row answered once, whatever the number of ranks, by the answering half that serves later."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.answers import Answer, Arrays, Row, Run
from engine.answers._batches import MASK, Recorder, answer_all
from engine.data.batches import EVALUATION_BATCH, batches_by_length
from engine.data.stored import lengths_of
from engine.stages import heartbeat
from engine.tasks import Example, Task


class Ranks(Protocol):
    """Those who share the work: the ranks of a stage (engine.training.processes.Processes), or one process alone."""

    rank: int
    processes: int

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""

    def sum(self, *values: float) -> list[float]:
        """Returns each value summed over all ranks."""

    def poll(self) -> None:
        """Called before every batch: shows that this rank is alive; raises when it was asked to stop."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In it, a loss is made with the products of training."""


class Alone:
    """One process that shares nothing."""

    rank, processes = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Returns the one value."""
        return [value]

    def sum(self, *values: float) -> list[float]:
        """Returns the values."""
        return list(values)

    def poll(self) -> None:
        """Shows that the process is alive."""
        heartbeat.beat("evaluate")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Changes nothing."""
        return contextlib.nullcontext()


ALONE = Alone()


def torch_run(model: torch.nn.Module, task: Task) -> Run:
    """Returns `run(graph, arrays)` of a PyTorch model, one batch a call."""
    device, graphs = next(model.parameters()).device, task.graphs

    def run(graph: str, arrays: Arrays) -> Arrays:
        batch = {name: torch.from_numpy(arrays[name]).to(device) for name in graphs[graph].inputs}
        with torch.no_grad():
            outputs = graphs[graph].run(model, batch, batch.get(MASK))
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    return run


class InStep:
    """A `run` in which all ranks make the same number of forward passes: a sharded model needs every rank in each."""

    def __init__(self, run: Run, ranks: Ranks) -> None:
        self.run, self.ranks = run, ranks
        self.last: tuple[str, Arrays] | None = None

    def __call__(self, graph: str, arrays: Arrays) -> Arrays:
        """Runs one batch."""
        self.ranks.poll()
        self.ranks.sum(1)
        self.last = (graph, arrays)
        return self.run(graph, arrays)

    def finish(self, idle: Arrays) -> None:
        """Joins the others until they have finished too; a rank that had nothing to do joins with `idle`."""
        while True:
            self.ranks.poll()
            if not self.ranks.sum(0)[0]:
                return
            self.run(*(self.last or ("model", idle)))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode and back as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def share_of_answers(model: torch.nn.Module, task: Task, rows: Sequence[Row], ranks: Ranks = ALONE) -> list[Answer]:
    """Returns the answers to this rank's share of the rows: every `processes`-th one.

    Args:
        model: in any mode; it is put back as it was.
    """
    run = InStep(torch_run(model, task), ranks)
    with evaluating(model):
        answers = answer_all(task.answers, run, rows[ranks.rank :: ranks.processes], EVALUATION_BATCH)
        if ranks.processes > 1:
            run.finish(task.answers.prepare(rows[:1]))
    return answers


def evaluate(
    model: torch.nn.Module, task: Task, rows: Sequence[Row], ranks: Ranks = ALONE
) -> tuple[dict[str, float], list[Answer]]:
    """Returns (metrics, answers in the order of `rows`)."""
    answers: list[Any] = [None] * len(rows)
    for rank, share in enumerate(ranks.gather(share_of_answers(model, task, rows, ranks))):
        answers[rank :: ranks.processes] = share
    assert all(answer is not None for answer in answers), "every row is answered exactly once"
    return task.answers.metrics(answers, rows), answers


def outputs_of(model: torch.nn.Module, task: Task, rows: Sequence[Row]) -> list[float]:
    """Returns every number that the model's graphs give for a few rows."""
    recorder = Recorder(torch_run(model, task))
    with evaluating(model):
        answer_all(task.answers, recorder, rows, EVALUATION_BATCH)
    return recorder.values()


@torch.no_grad()
def lessons_of(
    model: torch.nn.Module, task: Task, examples: Sequence[Example], temperature: float, ranks: Ranks = ALONE
) -> dict[int, Arrays]:
    """Returns what a student imitates of this model, for this rank's share of encoded rows: every `processes`-th batch.

    All ranks run the same number of forward passes.

    Returns:
        {number of the example: {name: its part of `Task.lesson`}}.
    """
    batches = batches_by_length(lengths_of(examples), EVALUATION_BATCH)
    found: dict[int, Arrays] = {}
    device = next(model.parameters()).device
    with evaluating(model):
        for turn in range(-(-len(batches) // ranks.processes)):
            ranks.poll()
            index = turn * ranks.processes + ranks.rank
            chosen = batches[min(index, len(batches) - 1)]
            batch = {k: v.to(device) for k, v in task.collate([examples[row] for row in chosen]).items()}
            given = task.lesson(task.named(task.forward(model, batch)), batch, temperature)
            if index >= len(batches):
                continue
            arrays, sizes = {name: tensor.cpu().numpy() for name, tensor in given.items()}, task.places(batch).int().tolist()
            for place, row in enumerate(chosen.tolist()):
                part = (place, slice(sizes[place])) if task.aligned else place
                found[row] = {name: array[part] for name, array in arrays.items()}
    return found


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
