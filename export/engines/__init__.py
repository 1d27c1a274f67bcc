"""Model → ONNX → inference engines, and the gates between them.

An engine is anything with this protocol; arrays are NumPy, B rows of L tokens.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

Weights = Literal["portable", "8bit"]
"""Form of int8 weights: exact on every CPU, or with all 8 bits used, see export.compress.quantize.QuantizeConfig."""


class Engine(Protocol):
    """A loaded inference engine."""

    inputs: list[str]
    """Names of its inputs: input_ids, attention_mask and, for some models, token_type_ids."""

    def run(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Runs one batch of int64 arrays of shape (B, L); returns float32 logits of shape (B, C)."""
        ...
