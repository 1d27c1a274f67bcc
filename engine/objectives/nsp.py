"""Masked tokens and next sentences (BERT, arXiv:1810.04805)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.objectives import Piece, _pairs, mlm


class Config(mlm.Config):
    """Masked language modelling, and whether the second part of a text follows the first (BERT, arXiv:1810.04805)."""

    type: Literal["nsp"] = "nsp"  # type: ignore[assignment]


class Objective(_pairs.Objective):
    """In half of the pairs the second part is as long a part of another document, in the other half it is what follows."""

    says = "masked language modelling with next sentences"

    def changed(
        self, first: np.ndarray, second: np.ndarray, piece: Piece, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray] | None:
        other = piece.elsewhere(len(second), rng)
        return None if other is None else (first, other)
