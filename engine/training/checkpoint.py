"""Checkpoints of a running stage: complete directories or none, each with the hashes of its files.

Layout: `<stage>.partial/checkpoints/step-00000100/` with the state of every rank, `state.json` (where the run stands) and
`manifest.json` (SHA-256 of every file). A checkpoint whose hashes do not match is passed over for the one before. The weights
that a checkpoint would hand on lie in `weights/step-00000080/` for as long as a checkpoint names them.

Training waits only for the copy to memory: one thread of every rank writes and hashes that rank's files; the main rank's then
waits for the others, writes the manifest and renames the directory into place.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError, disk_full
from engine.stages import heartbeat
from engine.stages.stage import discard, hash_directory, publish, recover, sha256
from engine.training.processes import Processes
from engine.training.trainer import SHARDS, Trainer

MANIFEST = "manifest.json"
STATE = "state.json"
START_OVER = "or add --restart to start the stage over"


@dataclass
class TrainState:
    """Where a run stands; with the weights and the optimizer it determines everything that follows."""

    step: int = 0
    """Optimizer steps done."""
    data_offset: int = 0
    """Steps of data that were left out by going back to a checkpoint: step s trains on the data of step s + data_offset."""
    bad_steps: int = 0
    """Steps skipped or rolled back so far."""
    recent_losses: list[float] = field(default_factory=list)
    """What a spike is measured against."""
    best: float | None = None
    """Best validation metric so far."""
    best_step: int = 0
    weights_step: int = 0
    """Step whose weights are handed on, as things stand."""
    probe: list[float] = field(default_factory=list)
    """A few logits of those weights."""
    evaluations_without_gain: int = 0
    evaluation_due: bool = False
    """The evaluation of this step was put off because the run was asked to stop."""
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
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: list[Future[None]] = []
        self._closed = False

    def later(self, job: Callable[[], None]) -> None:
        """Runs `job` after everything that was begun before; what it raises comes out of the next call of `wait` or `save`."""
        self._jobs.append(self._thread.submit(job))

    def wait(self) -> None:
        """Waits until this rank has written what was begun; on the main rank everything is in place then.

        Raises:
            UserError: the disk is full; the checkpoints already there are untouched.
        """
        while self._jobs:
            heartbeat.beat("save")
            self._jobs.pop(0).result()

    def check(self) -> None:
        """Raises what has gone wrong so far, as `wait` does, without waiting."""
        while self._jobs and self._jobs[0].done():
            self._jobs.pop(0).result()

    def close(self) -> None:
        """Gives up what is not yet in place."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def save(self, trainer: Trainer, state: TrainState, then: Callable[[], None]) -> None:
        """Copies a checkpoint to memory and writes it while training goes on; every rank must call it.

        It waits for the checkpoint before: there is never more than one copy.

        Args:
            then: called on the main rank when the checkpoint is in place.

        Raises:
            UserError: the disk was full.
        """
        self.wait()
        target = self.directory / f"step-{state.step:08d}"
        part = target.with_suffix(".tmp")
        with self._explained(target):
            if self.processes.main:
                part.mkdir(parents=True)
            self.processes.barrier()
            files = trainer.snapshot(part)
        now = self.processes
        about = {**asdict(state), "processes": now.processes, "zero_stage": now.zero_stage, "layout": now.layout}
        about["optimizer"] = now.train.optimizer
        self.later(lambda: self._write(target, part, files, json.dumps(about), then))

    def _write(self, target: Path, part: Path, files: dict[Path, Any], about: str, then: Callable[[], None]) -> None:
        with self._explained(target):
            written = {}
            for path in list(files):
                self._proceed()
                torch.save(files.pop(path), path)
                written[path.relative_to(part).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
            done = part / f"rank{self.processes.rank}.done"
            done.with_suffix(".tmp").write_text(json.dumps(written))
            done.with_suffix(".tmp").rename(done)
            if not self.processes.main:
                return
            manifest: dict[str, Any] = {}
            for rank in range(self.processes.processes):
                manifest |= self._hashes_of(part / f"rank{rank}.done")
            (part / STATE).write_text(about)
            manifest |= hash_directory(part, skip=tuple(manifest))
            (part / MANIFEST).write_text(json.dumps(manifest))
            self._proceed()
            publish(part, target)
            for step in self.steps()[: -self.keep]:
                discard(self.directory / f"step-{step:08d}")
            then()

    def _hashes_of(self, done: Path) -> dict[str, Any]:
        while not done.exists():  # a rank that has died takes this one with it: its launcher ends them all
            self._proceed()
            time.sleep(0.02)
        hashes = json.loads(done.read_text())
        done.unlink()
        return hashes

    def _proceed(self) -> None:
        if self._closed:
            raise InterruptedError("the run ended while a checkpoint was being written")

    @contextlib.contextmanager
    def _explained(self, target: Path) -> Iterator[None]:
        """Makes one clear line of a full disk; what is half-written goes at the next start."""
        try:
            yield
        except Exception as error:
            if not disk_full(error):
                raise
            kept = self.steps()
            left = f"the checkpoint of step {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
            raise UserError(f"{target}: disk full while saving the checkpoint: free some space and run again; {left}") from None

    def weights_steps(self) -> set[int]:
        """Returns the steps whose weights a checkpoint on disk would hand on."""
        states = [self.directory / f"step-{step:08d}" / STATE for step in self.steps()]
        return {json.loads(path.read_text())["weights_step"] for path in states}

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, oldest first."""
        return step_numbers(self.directory)

    def resume(self, trainer: Trainer) -> TrainState | None:
        """Loads the newest intact checkpoint, also one of another number of ranks; every rank must call it.

        Returns:
            its state, or None when there is none to go on from.

        Raises:
            UserError: it cannot be spread over this number of ranks.
        """
        heartbeat.beat("load")
        if self.processes.main:
            recover(self.directory)
        chosen = self.processes.gather(self._newest_intact() if self.processes.main else None)[0]
        if chosen is None:
            return None
        path = self.directory / f"step-{chosen:08d}"
        about: dict[str, Any] = json.loads((path / STATE).read_text())
        before, stage, layout, optimizer = (about.pop(key) for key in ("processes", "zero_stage", "layout", "optimizer"))
        self._check_stage(path, stage)
        spread = stage > 0 and (before, layout) != (self.processes.processes, self.processes.layout)
        if spread:
            self._check_spread(path, before, layout, optimizer)
        universal = self._universal(path) if spread else None
        heartbeat.beat("load")
        trainer.restore(universal or path, universal=spread)
        if universal:
            self.processes.barrier()
            if self.processes.main:
                shutil.rmtree(universal)
        return TrainState(**about)

    def _check_stage(self, path: Path, stage: int) -> None:
        """Raises UserError unless a checkpoint of a ZeRO stage can go on at the stage of this run."""
        now = self.processes.zero_stage
        if stage != now:
            raise UserError(
                f"{path} was made at ZeRO stage {stage} and this run is at stage {now} (0: none), "
                f"which its optimizer state cannot change: set `parallel` back, {START_OVER}"
            )

    def _check_spread(self, path: Path, before: int, layout: dict[str, Any], optimizer: str) -> None:
        """Raises UserError unless a checkpoint of `before` ranks can be cut anew for this run."""
        ways = (layout, self.processes.layout)
        what = None
        if optimizer == "adamw_8bit":
            what = "adamw_8bit, whose 8-bit state"
        elif any(way["round_robin_gradients"] for way in ways):
            what = "round_robin_gradients, whose order"
        elif any("nvme" in way.values() for way in ways):
            what = "state on NVMe, which"
        if what:
            raise UserError(
                f"{path} was made by {before} processes at ZeRO stage {self.processes.zero_stage} with {what} cannot be "
                f"spread anew: run with processes={before} and set `parallel` back, {START_OVER}"
            )

    def _universal(self, path: Path) -> Path:
        """Returns the universal form of a checkpoint, made on the main rank for this one resume."""
        target = path.with_name(path.name + ".universal.tmp")
        heartbeat.beat("convert")
        if self.processes.main:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += ["--input_folder", str(path / SHARDS), "--output_folder", str(target / SHARDS)]
            with self._explained(target):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{path} cannot be spread in another way:\n{done.stdout}{done.stderr}")
            print(f"  {path.name} converted for {self.processes.processes} processes", flush=True)
        self.processes.barrier()
        return target

    def _newest_intact(self) -> int | None:
        for step in reversed(self.steps()):
            path = self.directory / f"step-{step:08d}"
            try:
                intact = json.loads((path / MANIFEST).read_text()) == hash_directory(path, skip=(MANIFEST,))
            except (OSError, json.JSONDecodeError):
                intact = False
            if intact:
                return step
            # By this name it is no checkpoint: none that is intact has to go for it.
            kept = path.with_suffix(".damaged")
            shutil.rmtree(kept, ignore_errors=True)
            path.rename(kept)
            print(f"checkpoint {path.name} is damaged: passed over, and kept as {kept.name}", flush=True)
        return None
