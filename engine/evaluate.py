"""Evaluation: every example counted once, whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine import heartbeat
from engine.data.batches import EVALUATION_BATCH, batches_by_length
from engine.tasks.classification import Classification, Example


class Ranks(Protocol):
    """Those who share the work: the ranks of a stage (engine.distributed.Processes), or one process alone."""

    rank: int
    processes: int

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""

    def sum(self, *values: float) -> list[float]:
        """Returns each value summed over all ranks."""

    def poll(self) -> None:
        """Called before every batch: shows that this rank is alive; raises when it was asked to stop."""


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


ALONE = Alone()


@torch.no_grad()
def classifier_logits(
    model: torch.nn.Module, task: Classification, examples: list[Example], ranks: Ranks = ALONE
) -> tuple[np.ndarray, np.ndarray]:
    """Runs this rank's share of the examples: every `processes`-th batch; all ranks run the same number of forward passes.

    Args:
        model: in any mode; it is put back as it was.

    Returns:
        (row numbers, shape (n,); logits, shape (n, C)) of this rank's share.
    """
    batches = batches_by_length([len(example["input_ids"]) for example in examples], EVALUATION_BATCH)
    rows, logits = [np.zeros(0, dtype=np.int64)], [np.zeros((0, len(task.labels)), dtype=np.float32)]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    for turn in range(-(-len(batches) // ranks.processes)):
        ranks.poll()
        index = turn * ranks.processes + ranks.rank
        chosen = batches[min(index, len(batches) - 1)]
        batch = {k: v.to(device) for k, v in task.collate([examples[row] for row in chosen]).items()}
        output = task.logits(model, batch).cpu().numpy()
        if index < len(batches):
            rows.append(chosen)
            logits.append(output)
    model.train(training)
    return np.concatenate(rows), np.concatenate(logits)


def evaluate_classifier(
    model: torch.nn.Module, task: Classification, examples: list[Example], ranks: Ranks = ALONE
) -> tuple[dict[str, float], np.ndarray]:
    """Returns (metrics, logits in the order of `examples`, shape (N, C))."""
    shares = ranks.gather(classifier_logits(model, task, examples, ranks))
    logits_NC = np.zeros((len(examples), len(task.labels)), dtype=np.float32)
    seen = np.zeros(len(examples), dtype=np.int64)
    for rows, logits in shares:
        logits_NC[rows] = logits
        seen[rows] += 1
    assert (seen == 1).all(), "every example is evaluated exactly once"
    return task.metrics(logits_NC, np.asarray([example["label"] for example in examples])), logits_NC


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
