"""Labelled rows on their way to the model: encoded splits and seekable batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.answers import Answer
from engine.config import Recipe
from engine.data.batches import BatchPlan
from engine.data.readers import Row
from engine.data.splits import Splits, load_splits
from engine.evaluate import evaluate, outputs_of, write_jsonl
from engine.tasks import Example, Task, TaskConfig, task_of_model

if TYPE_CHECKING:
    from engine.data.splits import DataConfig
    from engine.distributed import Batch, Processes

PROBE_ROWS = 8


@dataclass(frozen=True)
class Prepared:
    """The splits of one task, as rows and encoded."""

    task: Task
    rows: Splits
    examples: dict[str, list[Example]]

    @property
    def describe(self) -> str:
        """Sizes of the splits, the labels and what truncation cut."""
        sizes = ", ".join(f"{len(examples):,} {name}" for name, examples in self.examples.items())
        labels = f"; labels {', '.join(self.task.answers.labels)}" if self.task.answers.labels else ""
        cut = f"; {self.task.truncated:,} rows cut to {self.task.max_length} tokens" if self.task.truncated else ""
        return f"{sizes} rows{labels}{cut}"

    def evaluate(self, model: Any, split: str, processes: Processes) -> tuple[dict[str, float], list[Answer]]:
        """Returns (metrics, answers) of a split, shared out over all ranks."""
        return evaluate(model, self.task, self.rows[split], processes)

    def probe(self, model: Any) -> list[float]:
        """Returns the outputs for a few validation rows: what saved weights have to give again when they are re-opened."""
        return outputs_of(model, self.task, self.rows["validation"][:PROBE_ROWS])

    def judge(
        self, evaluate: Callable[[list[Row]], tuple[dict[str, float], list[Answer]]], output: Path | None
    ) -> dict[str, dict[str, float]]:
        """Judges a finished model or engine on the held-out splits.

        Args:
            evaluate: returns (metrics, answers) of rows.
            output: where `predictions.jsonl` (test) and `validation_predictions.jsonl` go; None: nowhere.

        Returns:
            the metrics of each split.
        """
        metrics = {}
        for split, name in (("validation", "validation_predictions.jsonl"), ("test", "predictions.jsonl")):
            if split in self.rows:
                rows = self.rows[split]
                metrics[split], answers = evaluate(rows)
                if output:
                    write_jsonl(output / name, [self.task.answers.record(a, row) for a, row in zip(answers, rows, strict=True)])
        return metrics


def load_rows(task: TaskConfig, data: DataConfig, recipe: Recipe) -> Splits:
    """Reads every split of a task's rows."""
    return load_splits(data, recipe, task.split_by, task.columns, task.class_of)


def prepare(rows: Splits, task: Task) -> Prepared:
    """Encodes every split."""
    return Prepared(task, rows, {name: task.encode(split) for name, split in rows.items()})


def prepare_for_model(config: Any, recipe: Recipe, model: Path | str, train_rows: int | None = None) -> Prepared:
    """Reads the rows of a stage and encodes them as its fine-tuned model does the task.

    Args:
        config: a section with `task`, `data` and `max_length`.
        train_rows: keep only so many training rows, from the top.
    """
    rows = load_rows(config.task, config.data, recipe)
    rows["train"] = rows["train"][:train_rows]
    for note in rows.notes:
        print(f"  {note}", flush=True)
    return prepare(rows, task_of_model(config.task, model, config.max_length))


class LabelledBatches:
    """Batches of encoded rows of similar length.

    Args:
        examples: encoded rows.
        task: collates them.
        batch_size: rows per optimizer step over all ranks.
        seed: of the shuffling.
        extra: arrays with one entry per example that travel with the batch (a teacher's outputs, for example).
    """

    def __init__(
        self,
        examples: list[Example],
        task: Task,
        batch_size: int,
        seed: int,
        extra: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.examples, self.task, self.extra = examples, task, extra or {}
        self.lengths = np.asarray([len(example["input_ids"]) for example in examples])
        self.plan = BatchPlan(self.lengths, batch_size, seed)
        self.steps_per_epoch = self.plan.steps_per_epoch

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`."""
        import torch

        batches = []
        for rows in self.plan.micro_batches(step, rank, processes, micro):
            batch: Batch = self.task.collate([self.examples[row] for row in rows])
            batch |= {name: torch.from_numpy(array[rows]) for name, array in self.extra.items()}
            # Unlabelled rows count when something else (a teacher) says what is right.
            batch["count"] = len(rows) if self.extra else self.task.count(batch)
            batch["tokens"] = int(self.lengths[rows].sum())
            batches.append(batch)
        return batches
