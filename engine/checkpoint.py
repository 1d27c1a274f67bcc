"""Checkpoints of a running stage: complete directories or none, each with the hashes of its files.

Layout: `<stage>.partial/checkpoints/step-00000100/` with the shards of every rank, `state.json` (where the run stands) and
`manifest.json` (SHA-256 of every file). A checkpoint whose hashes do not match is passed over for the one before. The weights
that a checkpoint would hand on lie in `weights/step-00000080/` for as long as a checkpoint names them.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.distributed import Processes, Trainer
from engine.errors import UserError, disk_full
from engine.stage import hash_directory, publish

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass
class TrainState:
    """Where a run stands; with the weights and the optimizer it determines everything that follows."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """Best validation metric so far."""
    best_step: int = 0
    weights_step: int = 0
    """Step whose weights are handed on, as things stand."""
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    """Training time of all runs together."""
    initial: dict[str, float] | None = None
    """Validation metrics before the first step."""
    stop: str | None = None
    """Why training ended before its last step."""


def step_numbers(directory: Path) -> list[int]:
    """Returns the numbers of the complete `step-…` directories, oldest first."""
    found = [path.name.removeprefix("step-") for path in directory.glob("step-*")]
    return sorted(int(name) for name in found if name.isdigit())


class Checkpoints:
    """The checkpoints of one stage, newest kept."""

    def __init__(self, directory: Path, processes: Processes, keep: int) -> None:
        self.directory = directory
        self.processes = processes
        self.keep = keep

    def save(self, trainer: Trainer, state: TrainState) -> None:
        """Writes a checkpoint; every rank must call it.

        Raises:
            UserError: the disk is full; the checkpoints already there are untouched.
        """
        target = self.directory / f"step-{state.step:08d}"
        part = target.with_suffix(".tmp")
        if self.processes.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.processes.barrier()
        try:
            trainer.save_shards(part)
            self.processes.barrier()
            if self.processes.main:
                (part / STATE).write_text(json.dumps({**asdict(state), "processes": self.processes.processes}))
                (part / MANIFEST).write_text(json.dumps(hash_directory(part)))
                publish(part, target)
                for step in self.steps()[: -self.keep]:
                    shutil.rmtree(self.directory / f"step-{step:08d}")
        except Exception as error:
            # The other ranks may wait for this one in a collective of the save: this one must go, which ends them too.
            shutil.rmtree(part, ignore_errors=True)
            if not disk_full(error):
                raise
            kept = self.steps()
            left = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            raise UserError(f"{target}: disk full while saving the checkpoint: free some space and run again; {left}") from None
        self.processes.barrier()

    def weights_steps(self) -> set[int]:
        """Returns the steps whose weights a checkpoint on disk would hand on."""
        states = [self.directory / f"step-{step:08d}" / STATE for step in self.steps()]
        return {json.loads(path.read_text())["weights_step"] for path in states}

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        return step_numbers(self.directory)

    def resume(self, trainer: Trainer) -> TrainState | None:
        """Loads the newest intact checkpoint; every rank must call it.

        Returns:
            its state, or None when there is none to go on from.

        Raises:
            UserError: it was made by another number of processes.
        """
        chosen = self.processes.gather(self._newest_intact() if self.processes.main else None)[0]
        if chosen is None:
            return None
        path = self.directory / f"step-{chosen:08d}"
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        before = state.pop("processes")
        if before != self.processes.processes:
            raise UserError(
                f"{path} was made by {before} processes and this run has {self.processes.processes}: "
                f"run with processes={before}, or add --restart to start the stage over"
            )
        trainer.load_shards(path)
        return TrainState(**state)

    def _newest_intact(self) -> int | None:
        for step in reversed(self.steps()):
            path = self.directory / f"step-{step:08d}"
            try:
                intact = json.loads((path / MANIFEST).read_text()) == hash_directory(path, skip=(MANIFEST,))
            except (OSError, json.JSONDecodeError):
                intact = False
            if intact:
                return step
            print(f"checkpoint {path.name} is damaged: passed over", flush=True)
        return None
