"""The answering half of every task, one file each: rows in, answers out, whatever runs the model.

The same file evaluates during training, predicts, serves, and lies in the Triton repository, so that what is judged is what is
served. All that it knows of a model is `run(graph, arrays) → {name: array}`. This folder needs NumPy and `tokenizers` and imports
nothing of ours outside itself: a Triton repository gets a copy of it.

Shapes: N rows.
"""

from __future__ import annotations

import abc
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from typing import Self

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Arrays], Arrays]
"""Runs one graph of a model: (its name, inputs by name with N rows each) → outputs by name with N rows each."""
Row = dict[str, Any]
Answer = dict[str, Any]
"""What is answered to one row: JSON-able, complete (what is shown of it is chosen later)."""

GROUP = "bothways.answers"
"""Entry points of packages that bring tasks of their own: name of the task → module of its answering half."""
MODEL = "model"
"""Name of the graph of a task with a single forward pass."""
CHUNK = 1024
"""Rows that are tokenized at a time where only their lengths are wanted."""


class RowError(ValueError):
    """A row that cannot be answered. The message is one line that names the column."""


class Metric(NamedTuple):
    """A figure of `metrics`, and how to read it."""

    name: str
    higher_is_better: bool = True
    unit: str = "%"
    """What stands behind the number."""
    counted: bool = False
    """A share of right examples in percent: it has a Wilson interval, and two models are compared by a paired bootstrap."""


class ServedTensor(NamedTuple):
    """An output of the text model that servers offer."""

    name: str
    datatype: str
    """STRING or FP32."""
    size: int
    """Elements of each row."""
    labelled: bool = False
    """Element i belongs to label i (the protocol's classification extension)."""


class Answers(abc.ABC):
    """One task's answering half.

    Attributes:
        takes_words: an input may be a list of words, which is then taken as it is.

    Args:
        facts: JSON-able: the keys of the task's section of the recipe and what was learnt from the training rows.
        tokenizer: a `tokenizers.Tokenizer` that truncates and pads as the model needs it.
    """

    takes_words = False

    def __init__(self, facts: dict[str, Any], tokenizer: Any) -> None:
        self.facts, self.tokenizer = facts, tokenizer

    @property
    @abc.abstractmethod
    def metric(self) -> Metric:
        """Chooses the best weights, and is what tables show."""

    @property
    @abc.abstractmethod
    def columns(self) -> dict[str, str]:
        """{name of an input: column of the rows that it was trained on}; a row may use either."""

    @abc.abstractmethod
    def prepare(self, rows: Sequence[Row]) -> Arrays:
        """Returns the inputs of the first graph, of N rows or more: a row may need several; rows need no truth.

        Raises:
            RowError: a row without its input.
        """

    def inputs(self, row: Row) -> Row:
        """Returns the inputs of a row alone, by their names, JSON-able."""
        return {name: str(row[column]) for name, column in self.columns.items()}

    @abc.abstractmethod
    def answer(self, run: Run, rows: Sequence[Row]) -> list[Answer]:
        """Returns one answer per row, in order. `run` takes any number of rows; it cuts them into batches."""

    @abc.abstractmethod
    def metrics(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
        """Judges answers to rows that hold the truth: at least `metric`, and `examples`, how many rows were judged."""

    def check(self, row: Row) -> None:  # noqa: B027 - most truths are looked at as cells
        """Looks at the truth of a row before it is judged.

        Raises:
            RowError: it cannot be read.
        """

    def table(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
        """Returns {part: its figures} where the rows have parts that are judged on their own, as classes; nothing by default."""
        return {}

    def choose(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
        """Returns facts that only a trained model tells, from its answers to validation rows: thresholds, for example.

        They are kept with the model. By default there are none.
        """
        return {}

    def knowing(self, chosen: dict[str, Any]) -> Self:
        """Returns the same with other facts, from `choose`."""
        return type(self)({**self.facts, **chosen}, self.tokenizer)

    def revised(self, answers: list[Answer]) -> list[Answer]:
        """Returns answers that were given with other facts as they are with these."""
        return answers

    @abc.abstractmethod
    def record(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns a line of predictions.jsonl: `id` (of the inputs alone), the truth and the prediction."""

    def explained(self, answer: Answer, row: Row) -> dict[str, Any]:
        """Returns what a person sees of an answer and the truth: {"inputs": {column: text}, and others as they are recorded}.

        A value may be {"pieces": as `pieces` gives them}.
        """
        inputs = {column: str(row.get(column, row.get(name))) for name, column in self.columns.items()}
        recorded = self.record(answer, row)
        return {"inputs": inputs, **{key: value for key, value in recorded.items() if key not in ("id", "scores")}}

    def right(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Says of every row whether it was answered right, shape (N,); only where `metric.counted`."""
        raise NotImplementedError

    off_by: ClassVar[str] = ""
    """What `wrongness` measures, in words."""

    def wrongness(self, answers: list[Answer], rows: Sequence[Row]) -> np.ndarray:
        """Returns how wrong each answer is, shape (N,): 0 where it is right, and the larger the worse.

        By default 1 for a wrong answer where answers are right or wrong, else 0.
        """
        return 1.0 - self.right(answers, rows) if self.metric.counted else np.zeros(len(rows))

    def confusion(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, Any] | None:
        """Returns what is taken for what: {"labels": names, "counts": [[true, given, rows], …] by number}; None: nothing."""
        return None

    def points(self, answers: list[Answer], rows: Sequence[Row]) -> dict[str, np.ndarray]:
        """Returns {name: true and given numbers, shape (N, 2)} where answers are numbers; nothing by default."""
        return {}

    def lengths(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the tokens of each row as the model reads it, shape (N,)."""
        chunks = [self.prepare(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
        return np.concatenate([np.asarray(arrays["attention_mask"]).sum(axis=1) for arrays in chunks])

    def agreement(self, answers: list[Answer], others: list[Answer]) -> float:
        """Returns how far two models answer the same, between 0 and 1: the share of equal answers."""
        return float(np.mean([answer == other for answer, other in zip(answers, others, strict=True)]))

    @property
    def padding(self) -> dict[str, int]:
        """{input: value that fills its padding}; 0 where nothing is said."""
        return {"input_ids": self.tokenizer.padding["pad_id"]} if self.tokenizer.padding else {}

    @property
    def labels(self) -> list[str]:
        """Names of the elements of labelled tensors."""
        return []

    @property
    def served(self) -> list[ServedTensor]:
        """What the text model gives; by default the answer as JSON."""
        return [ServedTensor("ANSWER", "STRING", 1)]

    def tensors(self, answers: list[Answer]) -> Arrays:
        """Returns the tensors of `served` for N answers; a STRING is an object array of bytes."""
        import json

        texts = [json.dumps(answer, ensure_ascii=False).encode() for answer in answers]
        return {"ANSWER": np.array(texts, dtype=np.object_).reshape(len(answers), 1)}

    def pieces(self, answer: Answer, row: Row) -> list[tuple[str, str | None]] | None:
        """Returns the text of a row in pieces, each with what it was found to be, or None; None where a task finds no pieces."""
        return None

    def line(self, answer: Answer) -> str:
        """Returns the answer in one line for a terminal, fields separated by tabs."""
        return "\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in answer.values())


def own() -> dict[str, str]:
    """Returns {task: module} of the files of this folder."""
    return {info.name: f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")}


def answering(task: str) -> type[Answers]:
    """Returns the answering half of a task: the class `Answers` of its file, here or in an installed package (`GROUP`).

    Raises:
        KeyError: no such task is installed.
    """
    module = own().get(task) or {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}[task]
    return importlib.import_module(module).Answers
