"""Batch jobs: the script of a stage, its submission, sweeps, and what jobs say."""

MAX_REQUEUES = 20
"""How often a job that was stopped goes on, unless it is told otherwise."""
SIGNAL_BEFORE = 120
"""Seconds before its end at which a job is asked for a checkpoint, unless it is told otherwise."""
