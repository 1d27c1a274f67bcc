"""ONNX Runtime on CPU: the embedded default engine."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engine.errors import UserError


class OrtEngine:
    """An ONNX model loaded by ONNX Runtime.

    Args:
        model: path of the .onnx file, or its bytes.
        threads: threads of one inference call; None: one per core.

    Raises:
        UserError: not an ONNX model that this ONNX Runtime can load.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            source = model if isinstance(model, bytes) else str(model)
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            where = "the ONNX model" if isinstance(model, bytes) else str(model)
            raise UserError(f"{where} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from None
        self.inputs = [item.name for item in self.session.get_inputs()]

    def run(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Runs one batch of int64 arrays of shape (B, L); returns float32 logits of shape (B, C)."""
        return self.session.run(["logits"], {name: arrays[name] for name in self.inputs})[0]
