"""Evaluation: every example counted once, whatever the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.batches import EVALUATION_BATCH, batches_by_length
from engine.tasks.classification import Classification, Example


@torch.no_grad()
def classifier_logits(
    model: torch.nn.Module, task: Classification, examples: list[Example], rank: int = 0, processes: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Runs the examples of one rank.

    Args:
        model: in any mode; it is put back as it was.
        rank, processes: this rank takes every `processes`-th batch; all ranks run the same number of forward passes.

    Returns:
        (row numbers, shape (n,); logits, shape (n, C)) of this rank's share.
    """
    batches = batches_by_length([len(example["input_ids"]) for example in examples], EVALUATION_BATCH)
    rounds = -(-len(batches) // processes)
    rows, logits = [np.zeros(0, dtype=np.int64)], [np.zeros((0, len(task.labels)), dtype=np.float32)]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    for turn in range(rounds):
        index = turn * processes + rank
        chosen = batches[min(index, len(batches) - 1)]
        batch = {k: v.to(device) for k, v in task.collate([examples[row] for row in chosen]).items()}
        output = task.logits(model, batch).cpu().numpy()
        if index < len(batches):
            rows.append(chosen)
            logits.append(output)
    model.train(training)
    return np.concatenate(rows), np.concatenate(logits)


def evaluate_classifier(
    model: torch.nn.Module,
    task: Classification,
    examples: list[Example],
    gather: Callable[[Any], list[Any]] = lambda share: [share],
    rank: int = 0,
    processes: int = 1,
) -> tuple[dict[str, float], np.ndarray]:
    """Returns (metrics, logits in the order of `examples`, shape (N, C)).

    Args:
        gather: returns the shares of all ranks; the default is a single rank.
    """
    shares = gather(classifier_logits(model, task, examples, rank, processes))
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
