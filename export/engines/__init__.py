"""Model → ONNX → inference engines, and the gates between them.

An engine is anything with this protocol; arrays are NumPy, B rows of L tokens.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

Weights = Literal["portable", "8bit"]
"""Form of int8 weights: exact on every CPU, or with all 8 bits used, see export.compress.quantize.QuantizeConfig."""


class Engine(Protocol):
    """A loaded inference engine: one graph of a model."""

    inputs: list[str]
    """Names of its inputs: input_ids, attention_mask and, for some models, token_type_ids."""

    outputs: list[str]
    """Names of its outputs."""

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch: the inputs by name (others are left alone) → the outputs by name."""
        ...
