"""`accelerate launch` as `bothways run` starts it: `python -m launch.accelerated ARGUMENTS`.

The same command with two differences: it dies with the process that started it, and it leaves the explanation of a failure to the
ranks' own records (engine.stages.rank) instead of printing a traceback of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

from engine.stages.rank import PARENT, die_with_parent


def main() -> None:
    """Entry point; takes the arguments of `accelerate launch`."""
    die_with_parent()
    os.environ[PARENT] = str(os.getpid())
    # The ranks answer SIGUSR1 with a checkpoint; their launcher has to live until they have.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args())
    except (ChildFailedError, subprocess.CalledProcessError):
        sys.exit(1)


if __name__ == "__main__":
    main()
