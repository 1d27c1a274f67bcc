"""A stage's entry point whose ranks fail as the environment variable FAIL says: `python -m tests.distributed.crashing`."""

import os
import signal

from engine.errors import UserError
from engine.finetune import FinetuneConfig
from engine.stages.stage import stage_main


def run(stage):
    """Meets the other ranks once, then rank 1 fails and the others wait for it."""
    from engine.training.processes import Processes

    processes = Processes(stage.config, stage.recipe)
    processes.barrier()
    if processes.rank == 1:
        if os.environ["FAIL"] == "crash":
            raise ZeroDivisionError("rank 1 divides by zero")
        if os.environ["FAIL"] == "mistake":
            raise UserError("recipe.yaml:3: rank 1 cannot use this")
        os.kill(os.getpid(), signal.SIGKILL)
    processes.barrier()


if __name__ == "__main__":
    stage_main("tests.distributed.crashing", FinetuneConfig, run)
