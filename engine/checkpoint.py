"""Checkpoints of a running stage: complete directories or none, each with the hashes of its files.

Layout: `<stage>.partial/checkpoints/step-00000100/` with the shards of every rank, `state.json` (where the run stands) and
`manifest.json` (SHA-256 of every file). A checkpoint whose hashes do not match is passed over for the one before.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.distributed import Processes, Trainer
from engine.errors import UserError
from engine.stage import hash_directory, publish

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """Where a run stands; with the weights and the optimizer it determines everything that follows."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """Best validation metric so far."""
    best_step: int = 0
    evaluations_without_gain: int = 0
    seconds: float = 0.0
    """Training time of all runs together."""
    initial: dict[str, float] | None = None
    """Validation metrics before the first step."""
    stop: str | None = None
    """Why training ended before its last step."""


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
        part = self.directory / f"{target.name}.tmp"
        if self.processes.main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.processes.barrier()
        failed = None
        try:
            trainer.save_shards(part)
        except Exception as error:  # torch reports a full disk as RuntimeError
            failed = str(error).splitlines()[0] if str(error) else type(error).__name__
        failures = [message for message in self.processes.gather(failed) if message]
        if not failures and self.processes.main:
            failures = self._publish(part, target, state)
        failures = [message for share in self.processes.gather(failures) for message in share]
        if failures:
            if self.processes.main:
                shutil.rmtree(part, ignore_errors=True)
            kept = self.steps()
            left = f"checkpoint of step {kept[-1]} is intact" if kept else "no earlier checkpoint exists"
            raise UserError(
                f"{target}: the checkpoint could not be written ({failures[0]}): free disk space and run again; {left}"
            )

    def _publish(self, part: Path, target: Path, state: TrainState) -> list[str]:
        try:
            (part / "state.json").write_text(json.dumps({**asdict(state), "processes": self.processes.processes}))
            (part / MANIFEST).write_text(json.dumps(hash_directory(part)))
            publish(part, target)
        except OSError as error:
            return [error.strerror or str(error)]
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.directory / f"step-{step:08d}")
        return []

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        found = [path.name.removeprefix("step-") for path in self.directory.glob("step-*")]
        return sorted(int(name) for name in found if name.isdigit())

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
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
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
