"""Many rows over something that runs one batch at a time: batches of similar length, least padding.

Shapes: N rows of a whole call, B rows of a batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.answers import Answer, Answers, Arrays, Row, Run

AT_ONCE = 4096
"""Rows that are tokenized and sorted by length together: bounds the memory of a long file."""
MASK = "attention_mask"


def answer_all(answers: Answers, run: Run, rows: Sequence[Row], size: int) -> list[Answer]:
    """Returns the answers to any number of rows, in order.

    Args:
        run: takes one batch.
        size: rows of a batch.
    """
    found: list[Answer] = []
    for start in range(0, len(rows), AT_ONCE):
        found += answers.answer(batched(run, size), rows[start : start + AT_ONCE])
    return found


def batched(run: Run, size: int) -> Run:
    """Returns a `run` for any number of rows: sorted by length, cut into batches of at most `size`, without idle columns.

    Inputs whose first two axes are those of the attention mask have a value for each token. Outputs whose second axis differs
    from batch to batch are filled up with zeros at its end.
    """

    def run_all(graph: str, arrays: Arrays) -> Arrays:
        total = len(next(iter(arrays.values())))
        mask = arrays.get(MASK)
        lengths = np.zeros(total) if mask is None else mask.sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        parts = [order[start : start + size] for start in range(0, total, size)]
        outputs = [run(graph, _cut(arrays, rows, mask)) for rows in parts]
        return {name: _in_order([output[name] for output in outputs], parts) for name in (outputs[0] if outputs else {})}

    return run_all


def _cut(arrays: Arrays, rows: np.ndarray, mask: np.ndarray | None) -> Arrays:
    """Returns some rows, without the columns that only padding fills."""
    if mask is None:
        return {name: array[rows] for name, array in arrays.items()}
    used = np.flatnonzero(mask[rows].any(axis=0))
    columns = slice(used[0], used[-1] + 1) if len(used) else slice(0, 1)
    return {name: array[rows, columns] if array.shape[:2] == mask.shape else array[rows] for name, array in arrays.items()}


def _in_order(outputs: list[np.ndarray], parts: list[np.ndarray]) -> np.ndarray:
    shape = np.max([output.shape[1:] for output in outputs], axis=0).astype(int)
    whole = np.zeros((sum(map(len, parts)), *shape), dtype=outputs[0].dtype)
    for output, rows in zip(outputs, parts, strict=True):
        place: Any = (rows, *(slice(0, size) for size in output.shape[1:]))
        whole[place] = output
    return whole


def padded(run: Run, length: int, padding: dict[str, int]) -> Run:
    """Returns a `run` whose batches have at least `length` tokens a row; `padding` says what fills an input."""

    def longer(graph: str, arrays: Arrays) -> Arrays:
        mask = arrays.get(MASK)
        missing = 0 if mask is None else max(0, length - mask.shape[1])

        def fill(name: str, array: np.ndarray) -> np.ndarray:
            if mask is None or array.shape[:2] != mask.shape:
                return array
            widths = ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2))
            return np.pad(array, widths, constant_values=padding.get(name, 0))

        return run(graph, {name: fill(name, array) for name, array in arrays.items()})

    return longer


class Recorder:
    """A `run` that keeps what went in and out: `calls` are (graph, inputs, outputs), in order."""

    def __init__(self, run: Callable[[str, Arrays], Arrays]) -> None:
        self.run = run
        self.calls: list[tuple[str, Arrays, Arrays]] = []

    def __call__(self, graph: str, arrays: Arrays) -> Arrays:
        outputs = self.run(graph, arrays)
        self.calls.append((graph, arrays, outputs))
        return outputs

    def values(self) -> list[float]:
        """Returns every number that was given, in order."""
        return [float(value) for *_, outputs in self.calls for array in outputs.values() for value in array.ravel()]

    def named(self) -> dict[tuple[int, str, str], Any]:
        """Returns {(number of the call, graph, output): array}."""
        return {
            (turn, graph, name): array for turn, (graph, _, outputs) in enumerate(self.calls) for name, array in outputs.items()
        }
