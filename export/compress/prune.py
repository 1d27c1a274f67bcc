"""Structured pruning: whole attention heads and FFN neurons leave the model, which gets physically smaller."""

from __future__ import annotations

from pydantic import Field

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.stage import Stage, stage_main
from engine.tasks import ClassificationConfig


class PruneConfig(Strict):
    """Section of a `prune` stage."""

    model: ModelRef
    """What to prune: a stage or a model directory with a classification head."""
    task: ClassificationConfig
    data: DataConfig
    """Training rows rank heads and neurons; validation and test rows measure the loss of accuracy."""
    heads: int = Field(ge=1)
    """Attention heads that stay in each layer."""
    neurons: int = Field(ge=1)
    """FFN neurons that stay in each layer."""
    examples: int = Field(1024, ge=1)
    """Training rows over which importance is summed."""
    max_length: int = Field(128, ge=4)


def run(stage: Stage[PruneConfig]) -> None:
    """Runs one pruning stage."""


def main() -> None:
    """Entry point of `python -m export.compress.prune RECIPE --stage NAME`."""
    stage_main("export.compress.prune", PruneConfig, run)


if __name__ == "__main__":
    main()
