"""Golden inputs of a bundle: what its engines gave for them at export, what the fp32 model gave, and how far that moves.

Shapes: N golden rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.answers import Answer, Answers, Row, RowError, Run
from engine.answers._batches import Recorder, batched, padded
from engine.answers._texts import digits
from engine.errors import UserError

GOLDEN = "golden.jsonl"
Values = dict[str, np.ndarray]
"""Everything that the graphs gave for one row, flat, by `graph/output`."""
Call = dict[str, np.ndarray]
"""What one call of a graph gave, by `graph/output`."""


class Golden(NamedTuple):
    """One golden row."""

    row: Row
    outputs: Values
    answer: Answer
    reference: Values
    reference_answer: Answer

    def as_json(self) -> dict[str, Any]:
        """Returns a line of golden.jsonl."""
        return {
            "row": self.row,
            "outputs": {name: digits(values) for name, values in self.outputs.items()},
            "answer": self.answer,
            "reference": {
                "outputs": {name: digits(values) for name, values in self.reference.items()},
                "answer": self.reference_answer,
            },
        }


def parse(path: Path, data: bytes) -> list[Golden]:
    """Reads golden.jsonl.

    Raises:
        UserError: it holds something else.
    """
    found = []
    try:
        for line in data.decode().split("\n"):
            if line:
                record = json.loads(line)
                reference = record["reference"]
                own, other = _values(record["outputs"]), _values(reference["outputs"])
                found.append(Golden(dict(record["row"]), own, dict(record["answer"]), other, dict(reference["answer"])))
        sizes = [{name: len(values) for name, values in part.items()} for row in found for part in (row.outputs, row.reference)]
        sound = bool(found) and all(sizes[2 * i] == sizes[2 * i + 1] and sizes[2 * i] for i in range(len(found)))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: no golden inputs with what the engines and the fp32 model gave: export the bundle anew")
    return found


def _values(outputs: dict[str, list[float]]) -> Values:
    values = {name: np.asarray(numbers, dtype=np.float32) for name, numbers in outputs.items()}
    if any(array.ndim != 1 for array in values.values()):
        raise ValueError("an output is no flat list of numbers")
    return values


def ask(answers: Answers, run: Run, row: Row) -> tuple[Answer, list[Call]]:
    """Returns the answer to one row alone, and what every call of a graph gave."""
    recorder = Recorder(run)
    (answer,) = answers.answer(recorder, [row])
    return answer, named(recorder)


def named(recorder: Recorder) -> list[Call]:
    """Returns what every recorded call gave."""
    return [{f"{graph}/{name}": array for name, array in outputs.items()} for graph, _, outputs in recorder.calls]


def flat(calls: list[Call]) -> Values:
    """Joins the calls for one row."""
    names = dict.fromkeys(name for call in calls for name in call)
    return {name: np.concatenate([call[name].ravel() for call in calls if name in call]) for name in names}


def observe(answers: Answers, run: Run, reference: Run, rows: Sequence[Row]) -> list[Golden]:
    """Returns the golden rows of engines and of the fp32 model that they came from."""
    found = []
    for row in rows:
        answer, calls = ask(answers, run, row)
        expected, before = ask(answers, reference, row)
        found.append(Golden(row, flat(calls), answer, flat(before), expected))
    return found


def measure(answers: Answers, run: Run, golden: list[Golden], max_batch: int, max_length: int) -> dict[str, Any]:
    """Runs the golden rows again: alone, in full batches and padded.

    Returns:
        {"outputs": {"graph/output": largest differences "golden", "batch", "padding", "reference"}, "agreement" (of the answers
        with those of the fp32 model), "golden_agreement" (with those at export)}.

    Raises:
        UserError: the installed answering half cannot read the golden rows.
    """
    rows = [each.row for each in golden]
    try:
        alone = [ask(answers, run, row) for row in rows]
        longer = [ask(answers, padded(run, max_length, answers.padding), row)[1] for row in rows]
        together = Recorder(batched(run, max_batch))
        answers.answer(together, rows)
    except RowError as error:
        raise UserError(f"a golden input cannot be read: {error}: export the bundle anew") from None
    calls = [calls for _, calls in alone]
    own = [flat(each) for each in calls]
    others = {
        "golden": [each.outputs for each in golden],
        "batch": _shares(named(together), calls),
        "padding": [_shares(there, [each])[0] for there, each in zip(longer, calls, strict=True)],
        "reference": [each.reference for each in golden],
    }
    given = [answer for answer, _ in alone]
    return {
        "outputs": {
            name: {check: max(_distance(a, b, name) for a, b in zip(own, there, strict=True)) for check, there in others.items()}
            for name in own[0]
        },
        "agreement": answers.agreement(given, [each.reference_answer for each in golden]),
        "golden_agreement": answers.agreement(given, [each.answer for each in golden]),
    }


def _distance(own: Values, other: Values, name: str) -> float:
    """Returns the largest difference of an output; infinite where something else was given."""
    if name not in other or other[name].shape != own[name].shape:
        return float("inf")
    return float(np.abs(own[name] - other[name]).max(initial=0))


def _shares(whole: list[Call], alone: list[list[Call]]) -> list[Values]:
    """Cuts what was given for all rows together into the share of each row, without what only padding added.

    Args:
        alone: the calls for each row alone; they say how many rows of a call are its own, and how long.
    """
    shares: list[list[Call]] = [[] for _ in alone]
    for turn, call in enumerate(whole):
        start = 0
        for own, share in zip(alone, shares, strict=True):
            if turn < len(own):
                first = next(iter(own[turn].values()))
                rows = slice(start, start := start + len(first))
                share.append({name: _cropped(call[name][rows], like) for name, like in own[turn].items() if name in call})
    return [flat(share) for share in shares]


def _cropped(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    return array[tuple(slice(0, size) for size in like.shape)] if array.ndim == like.ndim else array
