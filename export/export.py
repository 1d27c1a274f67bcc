"""The export stage: a model becomes ONNX, engines, a benchmark and a bundle that checks itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.stage import Stage, stage_main
from engine.tasks import ClassificationConfig

Backend = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]


class ExportConfig(Strict):
    """Section of an `export` stage."""

    model: ModelRef
    """What to serve: a `quantize` stage (int8) or any stage or model directory (fp32)."""
    task: ClassificationConfig
    data: DataConfig
    """Training rows give the length histogram and the golden inputs; test rows the accuracy and latency."""
    backends: list[Backend] = ["onnxruntime"]
    """`onnxruntime` is always there: it is the embedded default."""
    baseline: ModelRef | None = None
    """The model that accuracy and latency are compared with, usually the teacher."""
    max_length: int = Field(128, ge=4)
    max_batch: int = Field(32, ge=1)
    """Largest batch of the engines' optimization profile and of the server."""
    threads: int = Field(2, ge=1)
    """Threads of the latency benchmark."""


def run(stage: Stage[ExportConfig]) -> None:
    """Runs one export stage."""


def main() -> None:
    """Entry point of `python -m export.export RECIPE --stage NAME`."""
    stage_main("export.export", ExportConfig, run)


if __name__ == "__main__":
    main()
