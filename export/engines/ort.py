"""ONNX Runtime on CPU: the embedded default engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from engine.cpu import instructions
from engine.errors import UserError


def session(model: Path | bytes, threads: int | None = None, wide: bool = False) -> Any:
    """Loads an ONNX model into ONNX Runtime.

    Args:
        model: path of the .onnx file, or its bytes.
        threads: threads of one inference call; None: one per core.
        wide: on x86 CPUs without VNNI add int8 products in 32 bits, not in 16 bits that saturate: slower there, and needed for
            weights that are not `portable` (export.compress.quantize).

    Raises:
        UserError: not an ONNX model that this ONNX Runtime can load.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if wide and not {"VNNI", "AMX"} & set(instructions()):  # where nothing saturates it would only cost time
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        where = "the ONNX model" if isinstance(model, bytes) else str(model)
        raise UserError(f"{where} cannot be loaded by ONNX Runtime: {str(error).splitlines()[0]}") from None


TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32"}


class OrtEngine:
    """A graph loaded by ONNX Runtime; arguments and errors are those of `session`."""

    def __init__(self, model: Path | bytes, threads: int | None = None, wide: bool = False) -> None:
        self.session = session(model, threads, wide)
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]

    def signature(self) -> dict[str, list[dict[str, Any]]]:
        """Returns {"inputs" | "outputs": [{"name", "dtype", "shape": sizes, or names of the axes that vary}]}."""
        sides = {"inputs": self.session.get_inputs(), "outputs": self.session.get_outputs()}
        return {
            side: [{"name": item.name, "dtype": TYPES.get(item.type, item.type), "shape": list(item.shape)} for item in items]
            for side, items in sides.items()
        }

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch: the inputs by name (others are left alone) → the outputs by name."""
        given = self.session.run(self.outputs, {name: arrays[name] for name in self.inputs})
        return dict(zip(self.outputs, given, strict=True))
