"""A pretraining stage one of whose losses is not finite on rank 1 only: `python -m tests.distributed.poisoned`."""

import math
import os

from engine import pretrain
from engine.objectives.mlm import Objective
from engine.stages.stage import stage_main
from engine.training import loop

BAD = 5
"""0-based step of the data that are bad."""


def run(stage):
    """Runs the stage; the loss of the bad step is not a number on rank 1."""
    loss, step, bad = Objective.loss, loop.Fit._step, []

    def watched(self, state):
        bad[:] = [state.step + state.data_offset == BAD and os.environ["RANK"] == "1"]
        try:
            return step(self, state)
        finally:
            bad.clear()

    def poisoned(self, model, batch):
        total, count = loss(self, model, batch)
        return total * math.nan if any(bad) else total, count

    loop.Fit._step = watched
    Objective.loss = poisoned
    pretrain.run(stage)


if __name__ == "__main__":
    stage_main("tests.distributed.poisoned", pretrain.PretrainConfig, run)
