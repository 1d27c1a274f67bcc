"""Masked tokens and the order of sentences (ALBERT, arXiv:1909.11942)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.objectives import Piece, _pairs, mlm


class Config(mlm.Config):
    """Masked language modelling, and whether two parts of a text stand in their order (ALBERT, arXiv:1909.11942)."""

    type: Literal["sop"] = "sop"  # type: ignore[assignment]


class Objective(_pairs.Objective):
    """In half of the pairs the two parts have changed places."""

    says = "masked language modelling with the order of sentences"

    def changed(
        self, first: np.ndarray, second: np.ndarray, piece: Piece, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return second, first
