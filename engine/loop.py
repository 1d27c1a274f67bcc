"""THE loop: optimizer steps, evaluations, checkpoints. Nothing in it asks which task, which backend, which ZeRO stage."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint import Checkpoints, TrainState
from engine.distributed import Batch, Loss, Processes, Trainer
from engine.errors import UserError
from engine.schedule import Schedule
from engine.stage import publish
from engine.tracking import LOG_EVERY, Tracker

PREEMPTED = 75
"""Exit status of a run that was asked to stop and saved a checkpoint (EX_TEMPFAIL: run it again)."""


class Batches(Protocol):
    """The training data of a stage, as a seekable function of (step, rank)."""

    steps_per_epoch: int

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`; each holds `count` (valid targets) and `tokens` beside its tensors."""


@dataclass(frozen=True)
class Judge:
    """How the progress of a stage is measured on its validation data."""

    evaluate: Callable[[Any, Processes], dict[str, float]]
    metric: str
    higher_is_better: bool

    def gain(self, new: float, best: float | None) -> float:
        """By how much `new` is better than `best`; infinite when there is no best yet."""
        if best is None:
            return math.inf
        return new - best if self.higher_is_better else best - new


class Fit:
    """One training: model, data, loss and judge, from step 0 or from the newest checkpoint to the weights that are handed on.

    Args:
        directory: working directory; checkpoints, history, TensorBoard and `weights/` go there.
        title: of the progress bar.
        save: writes a model directory from (path, consolidated weights).
    """

    def __init__(
        self,
        processes: Processes,
        model: Any,
        loss: Loss,
        batches: Batches,
        judge: Judge,
        save: Callable[[Path, dict[str, Any]], None],
        directory: Path,
        title: str,
        seed: int,
    ) -> None:
        train = processes.train
        self.processes, self.batches, self.judge, self.save, self.directory = processes, batches, judge, save, directory
        self.schedule = Schedule.of(train, batches.steps_per_epoch)
        self.trainer = Trainer(processes, model, loss)
        self.trainer.seed = seed
        self.checkpoints = Checkpoints(directory / "checkpoints", processes, train.keep_checkpoints)
        self.tracker = Tracker(title, directory, self.schedule.total_steps, processes.main)
        every = train.evaluate_every
        if every is None:
            every = batches.steps_per_epoch
        self.evaluate_every = max(1, round(every * self.schedule.total_steps)) if isinstance(every, float) else every
        self.checkpoint_every = train.checkpoint_every or self.evaluate_every
        self.weights = directory / "weights"
        self.asked_to_stop = 0

    def run(self) -> TrainState:
        """Trains to the end; afterwards `weights/` holds the model directory that the stage hands on.

        Raises:
            UserError: non-finite loss, or a disk that is full.
            SystemExit: status PREEMPTED, after SIGTERM or SIGUSR1 and a checkpoint.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        state = self.checkpoints.resume(self.trainer)
        if state is None:
            # Evaluating and saving once at the start shows an out-of-memory or disk problem in the first minute.
            state = TrainState()
            self._evaluate(state)
            self.checkpoints.save(self.trainer, state)
        elif state.step:
            self.tracker.say(f"resuming after step {state.step} of {self.schedule.total_steps}")
        self.tracker.start(state.step)
        try:
            self._loop(state)
        finally:
            self.tracker.close()
        return state

    def _loop(self, state: TrainState) -> None:
        processes, window = self.processes, _Window()
        for step in range(state.step, self.schedule.total_steps if state.stop is None else 0):
            batch = self.batches.at(step, processes.rank, processes.processes, processes.micro)
            count = sum(part["count"] for part in batch)
            tokens = sum(part["tokens"] for part in batch)
            count, tokens, asked = processes.sum(count, tokens, self.asked_to_stop)
            if count == 0:
                raise UserError(f"step {step} has no valid target: the loss would be undefined; look at the data or the masking")
            loss, norm = self.trainer.step(batch, step, self.schedule.at(step), count)
            window.add(loss, count, tokens)
            state.step = step + 1
            last = state.step == self.schedule.total_steps
            if state.step % LOG_EVERY == 0 or last:
                self._log(state, window, norm, self.schedule.at(step))
            if state.step % self.evaluate_every == 0 or last:
                window.pause(lambda: self._evaluate(state))
            if asked or state.step % self.checkpoint_every == 0 or last or state.stop:
                window.pause(lambda: self.checkpoints.save(self.trainer, state))
            if asked:
                self.tracker.say(f"asked to stop: checkpoint of step {state.step} saved; run again to go on")
                raise SystemExit(PREEMPTED)
            if state.stop:
                self.tracker.say(state.stop)
                return

    def _log(self, state: TrainState, window: _Window, norm: float | None, learning_rate: float) -> None:
        (loss,) = self.processes.sum(window.loss)
        loss /= window.count
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {state.step}: lower train.learning_rate or raise train.warmup; "
                f"checkpoints: {self.checkpoints.steps()}"
            )
        seconds = window.seconds()
        state.seconds += seconds
        speed = window.tokens / seconds
        self.tracker.record(
            state, loss=loss, learning_rate=learning_rate, tokens_per_second=speed, grad_norm=norm, seconds=state.seconds
        )
        self.tracker.advance(state, loss, speed)
        window.clear()

    def _evaluate(self, state: TrainState) -> None:
        metrics = self.judge.evaluate(self.trainer.model, self.processes)
        if state.step == 0:
            state.initial = metrics
        self.tracker.record(state, validation=metrics)
        value = metrics[self.judge.metric]
        self.tracker.say(f"step {state.step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        train = self.processes.train
        stopping = train.early_stopping
        gained = state.step > 0 and self.judge.gain(value, state.best) > (stopping.min_delta if stopping else 0.0)
        if gained:
            state.best, state.best_step, state.evaluations_without_gain = value, state.step, 0
        elif state.step:
            state.evaluations_without_gain += 1
        if gained or train.keep == "last" or state.step == 0:
            self._keep_weights()
        if stopping and state.evaluations_without_gain >= stopping.patience:
            state.stop = (
                f"early stopping at step {state.step}: {self.judge.metric} has not improved for {stopping.patience} evaluations; "
                f"best {state.best:.4g} at step {state.best_step}"
            )

    def _keep_weights(self) -> None:
        weights = self.trainer.weights()
        if self.processes.main:
            part = self.weights.with_name("weights.tmp")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            self.save(part, weights)
            publish(part, self.weights)
        self.processes.barrier()

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked_to_stop = 1


class _Window:
    """Sums since the last log record; time spent evaluating and saving is not training time."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.loss = self.count = self.tokens = 0.0
        self.started = time.monotonic()

    def add(self, loss: float, count: float, tokens: float) -> None:
        self.loss += loss
        self.count += count
        self.tokens += tokens

    def pause(self, work: Callable[[], None]) -> None:
        before = time.monotonic()
        work()
        self.started += time.monotonic() - before

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)
