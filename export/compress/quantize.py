"""int8 post-training quantization with real calibration rows."""

from __future__ import annotations

from pydantic import Field

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.stage import Stage, stage_main
from engine.tasks import ClassificationConfig


class QuantizeConfig(Strict):
    """Section of a `quantize` stage."""

    model: ModelRef
    """What to quantize: a stage or a model directory with a classification head."""
    task: ClassificationConfig
    data: DataConfig
    """Training rows calibrate; validation and test rows measure the loss of accuracy."""
    examples: int = Field(512, ge=1)
    """Training rows that calibrate the activation ranges."""
    max_length: int = Field(128, ge=4)


def run(stage: Stage[QuantizeConfig]) -> None:
    """Runs one quantization stage."""


def main() -> None:
    """Entry point of `python -m export.compress.quantize RECIPE --stage NAME`."""
    stage_main("export.compress.quantize", QuantizeConfig, run)


if __name__ == "__main__":
    main()
