"""Gates between an engine and the model that it came from.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.config import Fraction, Strict
from engine.data.batches import EVALUATION_BATCH, batches_by_length
from engine.errors import UserError
from export.engines import Engine

if TYPE_CHECKING:
    from engine.tasks.classification import Classification, Example


class ParityGates(Strict):
    """How far an engine may stray from the model that it came from."""

    agreement: Fraction = 0.95
    """Smallest share of rows for which both predict the same label."""
    invariance: float = 1e-3
    """Largest change of a logit, relative to the spread of all logits, when a row shares its batch with others or is padded."""


def engine_logits(engine: Engine, task: Classification, examples: list[Example], batch: int, length: int = 0) -> np.ndarray:
    """Returns the logits of every example, shape (N, C).

    Args:
        batch: rows per call, of similar length.
        length: pad every batch to at least so many tokens.
    """
    logits_NC = np.zeros((len(examples), len(task.labels)), dtype=np.float32)
    for rows in batches_by_length([len(example["input_ids"]) for example in examples], batch):
        arrays = task.collate([examples[row] for row in rows])
        missing = max(0, length - arrays["input_ids"].shape[1])
        padding = {"input_ids": task.tokenizer.pad_token_id}
        padded = {
            name: np.pad(arrays[name].numpy(), ((0, 0), (0, missing)), constant_values=padding.get(name, 0))
            for name in engine.inputs
        }
        logits_NC[rows] = engine.run(padded)
    return logits_NC


def evaluate_engine(engine: Engine, task: Classification, examples: list[Example]) -> tuple[dict[str, float], np.ndarray]:
    """Returns (metrics, logits of shape (N, C)) of labelled examples."""
    logits_NC = engine_logits(engine, task, examples, EVALUATION_BATCH)
    return task.metrics(logits_NC, np.asarray([example["label"] for example in examples])), logits_NC


def check_parity(
    engine: Engine, task: Classification, examples: list[Example], reference_NC: np.ndarray, gates: ParityGates
) -> dict[str, float]:
    """Compares an engine with its source model, and with itself over batch sizes and paddings.

    Args:
        examples: rows; a few dozen of all lengths.
        reference_NC: logits of the source model for them.

    Returns:
        agreement (share of equal labels), cosine, max_difference (of logits), batch_difference and padding_difference (relative
        to the spread of the logits).

    Raises:
        UserError: a gate is not passed.
    """
    alone = engine_logits(engine, task, examples, 1)
    together = engine_logits(engine, task, examples, EVALUATION_BATCH)
    padded = engine_logits(engine, task, examples, 1, task.max_length)
    spread = float(np.ptp(reference_NC)) or 1.0
    norms = np.linalg.norm(alone, axis=1) * np.linalg.norm(reference_NC, axis=1)
    found = {
        "agreement": float((alone.argmax(1) == reference_NC.argmax(1)).mean()),
        "cosine": float(((alone * reference_NC).sum(1) / norms).mean()),
        "max_difference": float(np.abs(alone - reference_NC).max()),
        "batch_difference": float(np.abs(alone - together).max()) / spread,
        "padding_difference": float(np.abs(alone - padded).max()) / spread,
        "rows": len(examples),
    }
    if found["agreement"] < gates.agreement:
        raise UserError(
            f"the engine predicts the label of its source model for only {found['agreement']:.1%} of {len(examples)} rows "
            f"(gates.agreement={gates.agreement:.1%}): calibrate with more examples, or lower the gate"
        )
    for name in ("batch", "padding"):
        if found[f"{name}_difference"] > gates.invariance:
            raise UserError(
                f"the engine's logits depend on {name}: they move by {found[f'{name}_difference']:.2g} of their spread "
                f"(gates.invariance={gates.invariance:g})"
            )
    return found
