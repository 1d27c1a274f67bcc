"""Batch jobs: the script of a stage, its submission, sweeps, and what jobs say."""
