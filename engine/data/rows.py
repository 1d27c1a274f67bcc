"""Labelled rows on their way to the model: encoded splits and seekable batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.answers import Answer
from engine.config import Recipe
from engine.data.batches import BatchPlan
from engine.data.ragged import RaggedArray
from engine.data.readers import Row
from engine.data.splits import Held, Splits, load_splits
from engine.data.stored import RowWriter, StoredExamples, StoredRows, in_chunks, lengths_of, write_examples
from engine.evaluate import evaluate, outputs_of, write_json, write_jsonl
from engine.judging import ends_of, judged_sets, seen_in, set_names
from engine.stages import heartbeat
from engine.stages.stage import made_once
from engine.tasks import Example, Facts, Task, task_class, task_of_model

if TYPE_CHECKING:
    from engine.data.batches import Batch
    from engine.training.processes import Processes

PREDICTIONS = {"validation": "validation_predictions.jsonl", "test": "predictions.jsonl"}
"""Where the answers to the rows of a split go, in the order in which splits are judged."""
PROBE_ROWS = 8
CHUNK = 4096
"""Rows encoded at a time: enough to keep all cores busy, little memory."""
ABOUT = "about.json"
"""In a directory of encoded rows: what all ranks have to know of them."""


@dataclass(frozen=True)
class Prepared:
    """The splits of one task, as rows and encoded."""

    task: Task
    rows: Mapping[str, Sequence[Row]]
    examples: Mapping[str, Sequence[Example]]
    notes: list[str] = field(default_factory=list)
    """What is to be said about the files and the splits."""
    slices: list[str] = field(default_factory=list)
    """Columns by which held-out rows are judged apart."""
    sets: dict[str, int] = field(default_factory=dict)
    """{name of a test set: its rows}, where the test rows are several, one after the other."""
    more: int = 0
    """Training rows that are not among `rows`: texts for a teacher."""

    @property
    def describe(self) -> str:
        """Sizes of the splits, the labels and what truncation cut."""
        sizes = ", ".join(f"{len(rows) + (self.more if name == 'train' else 0):,} {name}" for name, rows in self.rows.items())
        labels = f"; labels {', '.join(self.task.answers.labels)}" if self.task.answers.labels else ""
        cut = f"; {self.task.truncated:,} rows cut to {self.task.max_length} tokens" if self.task.truncated else ""
        longer = f"; {self.task.windows:,} more windows of rows longer than {self.task.max_length} tokens"
        more = longer if self.task.windows else ""
        return "; ".join([f"{sizes} rows{labels}{cut}{more}", *self.task.notes])

    def evaluate(self, model: Any, split: str, processes: Processes) -> tuple[dict[str, float], list[Answer]]:
        """Returns (metrics, answers) of a split, shared out over all ranks."""
        return evaluate(model, self.task, self.rows[split], processes)

    def progress(self, model: Any, processes: Processes) -> dict[str, float]:
        """Judges a model in training on the validation rows, with what would be chosen on them if it were the last."""
        return self._chosen(*self.evaluate(model, "validation", processes))[1]

    def _chosen(self, metrics: dict[str, float], answers: list[Answer]) -> tuple[Facts, dict[str, float], list[Answer]]:
        """Returns what is chosen by answers to the validation rows, and metrics and answers as they are with it."""
        rows, judge = self.rows["validation"], self.task.answers
        chosen = judge.choose(answers, rows)
        if not chosen:
            return {}, metrics, answers
        judge = judge.knowing(chosen)
        answers = judge.revised(answers)
        return chosen, judge.metrics(answers, rows), answers

    def probe(self, model: Any) -> list[float]:
        """Returns the outputs for a few validation rows: what saved weights have to give again when they are re-opened."""
        return outputs_of(model, self.task, self.rows["validation"][:PROBE_ROWS])

    def judge(
        self,
        evaluate: Callable[[Sequence[Row]], tuple[dict[str, float], list[Answer]]],
        output: Path | None,
        choose: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Judges a finished model or engine on the held-out splits.

        Args:
            evaluate: returns (metrics, answers) of rows.
            output: where the predictions (PREDICTIONS) and what else is seen in them (`seen_in`) go; None: nowhere.
            choose: the model has just been trained: the task takes over what the validation rows tell (`Answers.choose`).

        Returns:
            the metrics of each split, and of each test set where there are several, as `test.NAME`; with `output`, those of the
            metric of the task with the ends of its interval.
        """
        metrics: dict[str, dict[str, float]] = {}
        answers: dict[str, list[Answer]] = {}
        for split in (name for name in PREDICTIONS if name in self.rows):
            metrics[split], answers[split] = evaluate(self.rows[split])
            if choose and split == "validation":
                chosen, metrics[split], answers[split] = self._chosen(metrics[split], answers[split])
                self.task.know(chosen)
        heartbeat.beat("finish")  # the others wait while the main rank looks closer
        return metrics if output is None else self._keep(metrics, answers, output)

    def _keep(
        self, metrics: dict[str, dict[str, float]], answers: dict[str, list[Answer]], output: Path
    ) -> dict[str, dict[str, float]]:
        """Writes the predictions and what else is seen in them. Returns the metrics with what `judge` adds for `output`."""
        judge, found = self.task.answers, {}
        files: dict[str, dict[str, Any]] = {}
        for split, given in answers.items():
            rows, sets = list(self.rows[split]), self.sets if split == "test" else {}
            records = zip(given, rows, set_names(sets, len(rows)), strict=True)
            write_jsonl(output / PREDICTIONS[split], [{**named, **judge.record(a, row)} for a, row, named in records])
            for name, seen in seen_in(judge, given, rows, self.slices, sets).items():
                files.setdefault(name, {})[split] = seen
            found[split] = metrics[split] | ends_of(judge, given, rows)
            found |= {f"{split}.{name}": own for name, own in judged_sets(judge, given, rows, sets).items()}
        for name, kept in files.items():
            write_json(output / name, kept)
        return found


def prepare(rows: Mapping[str, Sequence[Row]], task: Task) -> Prepared:
    """Encodes every split in memory."""
    examples = {name: task.encode(split) for name, split in rows.items()}
    task.begin(examples["train"])
    said = {name: getattr(rows, name) for name in ("notes", "slices", "sets") if hasattr(rows, name)}
    return Prepared(task, rows, examples, **said)


def prepare_on_disk(
    config: Any,
    recipe: Recipe,
    directory: Path,
    ranks: Processes,
    tokenizer: Any,
    learn: Callable[[Sequence[Row]], Facts],
    more: Callable[[Splits], Iterable[Row]] = lambda rows: (),
) -> Prepared:
    """Reads and encodes the rows of a stage on the main rank, once; every rank then reads the files in place.

    Args:
        config: a section with `task`, `data` and `max_length`.
        directory: of the files, complete or absent; what is there already is taken.
        ranks: all of them call this.
        tokenizer: of the model.
        learn: what the task has to know, from its training rows; called where the rows are read.
        more: rows to train on beside them, from the splits.

    Raises:
        UserError: a row that cannot be read or encoded; on the main rank.
    """
    kind = task_class(config.task)

    def task_of(rows: Sequence[Row]) -> Task:
        return kind(config.task, learn(rows), tokenizer, config.max_length)

    with ranks.main_first():
        made_once(directory, lambda part: _store(config, recipe, part, task_of, more))
    about = json.loads((directory / ABOUT).read_text())
    task = kind(config.task, about["facts"], tokenizer, config.max_length)
    task.truncated, task.windows = about["truncated"], about["windows"]
    rows = {name: StoredRows(directory / name) for name in about["splits"]}
    examples = {name: StoredExamples(directory / name) for name in rows}
    task.begin(examples["train"])
    return Prepared(task, rows, examples, about["notes"], config.data.slices, about["sets"], about["more"])


def _store(
    config: Any,
    recipe: Recipe,
    directory: Path,
    task_of: Callable[[Sequence[Row]], Task],
    more: Callable[[Splits], Iterable[Row]],
) -> None:
    wanted = config.task
    rows = load_splits(
        config.data, recipe, wanted.split_by, wanted.columns, wanted.classes_of, lambda name: RowWriter(directory / name)
    )
    task, added = task_of(rows["train"]), list(more(rows))
    for name, split in rows.items():
        every = itertools.chain(split, added) if name == "train" else iter(split)
        write_examples((example for chunk in in_chunks(every, CHUNK) for example in task.encode(chunk)), directory / name)
    counted = {"truncated": task.truncated, "windows": task.windows, "more": len(added)}
    about = {"splits": list(rows), "facts": task.facts, **counted, "notes": rows.notes, "sets": rows.sets}
    (directory / ABOUT).write_text(json.dumps(about, ensure_ascii=False))


def prepare_for_model(config: Any, recipe: Recipe, model: Path | str, train_rows: int | None = None) -> Prepared:
    """Reads the rows of a stage and encodes them as its fine-tuned model does the task.

    Args:
        config: a section with `task`, `data` and `max_length`.
        train_rows: keep only so many training rows, from the top.
    """
    wanted = config.task
    limits = {"train": train_rows}
    rows = load_splits(
        config.data, recipe, wanted.split_by, wanted.columns, wanted.classes_of, lambda name: Held(limits.get(name))
    )
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
        extra: arrays with one entry per example that travel with the batch (a teacher's outputs, for example); what they give for
            an array of row numbers is taken.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        task: Task,
        batch_size: int,
        seed: int,
        extra: Mapping[str, np.ndarray | RaggedArray] | None = None,
    ) -> None:
        self.examples, self.task, self.extra = examples, task, extra or {}
        self.lengths = lengths_of(examples)
        self.plan = BatchPlan(self.lengths, batch_size, seed, groups=task.groups(examples))
        self.steps_per_epoch = self.plan.steps_per_epoch

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`."""
        import torch

        batches = []
        for rows in self.plan.micro_batches(step, rank, processes, micro):
            batch: Batch = self.task.collate([self.examples[row] for row in rows])
            batch |= {name: torch.from_numpy(array[rows]) for name, array in self.extra.items()}
            # Unlabelled rows count when something else (a teacher) says what is right.
            batch["count"] = float(self.task.sizes(batch).sum()) if self.extra else self.task.count(batch)
            batch["tokens"] = int(self.lengths[rows].sum())
            batches.append(batch)
        return batches
