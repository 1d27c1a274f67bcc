"""Gates between the engines of a model and the model that they came from: answer by answer, output by output.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.answers import Answer, Answers, Row, Run
from engine.answers._batches import AT_ONCE, Recorder, answer_all, batched, padded
from engine.config import Fraction, Strict
from engine.data.batches import EVALUATION_BATCH
from engine.errors import UserError
from export.engines import Engine

Outputs = dict[tuple[int, int, str, str], np.ndarray]
"""What the graphs gave: {(chunk of rows, call, graph, output): array}."""


class ParityGates(Strict):
    """How far an engine may stray from the model that it came from."""

    agreement: Fraction = 0.95
    """Smallest share of rows for which both give the same answer; for classes, the same label."""
    invariance: float = 1e-3
    """Largest change of an output, relative to the spread of its values, when a row shares its batch with others or is padded."""


def run_of(engines: Mapping[str, Engine]) -> Run:
    """Returns `run(graph, arrays)` of loaded engines by graph, one batch a call."""
    return lambda graph, arrays: engines[graph].run(arrays)


def evaluate_engine(run: Run, answers: Answers, rows: Sequence[Row]) -> tuple[dict[str, float], list[Answer]]:
    """Returns (metrics, answers) of rows that hold the truth."""
    given = answer_all(answers, run, rows, EVALUATION_BATCH)
    return answers.metrics(given, rows), given


def observe(run: Run, answers: Answers, rows: Sequence[Row], batch: int = EVALUATION_BATCH) -> tuple[list[Answer], Outputs]:
    """Returns the answers and everything that the graphs gave for them.

    Args:
        batch: rows per call.
    """
    given: list[Answer] = []
    outputs: Outputs = {}
    for chunk, start in enumerate(range(0, len(rows), AT_ONCE)):
        recorder = Recorder(batched(run, batch))
        given += answers.answer(recorder, rows[start : start + AT_ONCE])
        outputs |= {(chunk, *key): array for key, array in recorder.named().items()}
    return given, outputs


def compare_outputs(own: Outputs, other: Outputs) -> dict[str, dict[str, float]]:
    """Compares two models' outputs.

    Returns:
        {"graph/output": {"cosine": mean over rows, "max_difference", "spread": of the values of `other`}}.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (chunk, call, graph, name), array in own.items():
        there = other.get((chunk, call, graph, name))
        if there is None or there.shape[0] != array.shape[0]:
            raise UserError(f"graph '{graph}' was called otherwise than in the model that it came from: export it anew")
        smaller = tuple(slice(0, min(sizes)) for sizes in zip(array.shape, there.shape, strict=True))
        pair = (array[smaller].reshape(len(array), -1), there[smaller].reshape(len(array), -1))
        found.setdefault(f"{graph}/{name}", []).append(pair)
    return {name: _distances(pairs) for name, pairs in found.items()}


def _distances(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    values = np.concatenate([there.ravel() for _, there in pairs])
    cosines = [
        (own * there).sum(1) / np.maximum(np.linalg.norm(own, axis=1) * np.linalg.norm(there, axis=1), 1e-12)
        for own, there in pairs
    ]
    return {
        "cosine": float(np.concatenate(cosines).mean()),
        "max_difference": max(float(np.abs(own - there).max(initial=0)) for own, there in pairs),
        "spread": float(np.ptp(values)) or 1.0,
    }


def check_parity(
    run: Run, answers: Answers, rows: Sequence[Row], reference: tuple[list[Answer], Outputs], gates: ParityGates, max_length: int
) -> dict[str, Any]:
    """Compares engines with their source model, and with themselves over batch sizes and paddings.

    Args:
        run: of the engines.
        rows: a few dozen of all lengths.
        reference: from `observe` of the source model.
        max_length: tokens to which rows are padded.

    Returns:
        agreement (share of equal answers) and rows; cosine, max_difference, batch_difference and padding_difference (the latter
        relative to the spread of the values), each the worst of all outputs; `outputs`, the same of each.

    Raises:
        UserError: a gate is not passed.
    """
    mine, alone = observe(run, answers, rows, 1)
    _, together = observe(run, answers, rows)
    _, longer = observe(padded(run, max_length, answers.padding), answers, rows, 1)
    outputs = compare_outputs(alone, reference[1])
    for key, other in (("batch", together), ("padding", longer)):
        for name, moved in compare_outputs(other, alone).items():
            outputs[name][f"{key}_difference"] = moved["max_difference"] / outputs[name]["spread"]
    found: dict[str, Any] = {
        "agreement": answers.agreement(mine, reference[0]),
        "cosine": min(entry["cosine"] for entry in outputs.values()),
        **{
            key: max(entry[key] for entry in outputs.values())
            for key in ("max_difference", "batch_difference", "padding_difference")
        },
        "rows": len(rows),
        "outputs": outputs,
    }
    if not found["agreement"] >= gates.agreement:
        raise UserError(
            f"the engine gives the answer of its source model for only {found['agreement']:.1%} of {len(rows)} rows "
            f"(gates.agreement={gates.agreement:.1%}): calibrate with more examples, or lower the gate"
        )
    for key in ("batch", "padding"):
        for name, entry in outputs.items():
            if not entry[f"{key}_difference"] <= gates.invariance:
                raise UserError(
                    f"the engine's {name} depend on {key}: they move by {entry[f'{key}_difference']:.2g} of their spread "
                    f"(gates.invariance={gates.invariance:g})"
                )
    return found
