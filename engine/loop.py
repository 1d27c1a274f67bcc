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

from engine.checkpoint import Checkpoints, TrainState, step_numbers
from engine.distributed import Batch, Loss, Processes, Trainer
from engine.errors import PREEMPTED, UserError
from engine.schedule import Schedule
from engine.stage import publish
from engine.tracking import LOG_EVERY, Tracker


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
        directory: working directory; checkpoints, history, TensorBoard and weights go there.
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
        self.state = TrainState()
        self.asked_to_stop = False

    @property
    def weights(self) -> Path:
        """The model directory that the stage hands on."""
        return self.directory / "weights" / f"step-{self.state.weights_step:08d}"

    def run(self) -> TrainState:
        """Trains to the end; afterwards `weights` is complete.

        Raises:
            UserError: a loss or gradient that is not finite, or a disk that is full.
            SystemExit: status PREEMPTED, after SIGTERM or SIGUSR1 and a checkpoint.
        """
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)}
        resumed = self.checkpoints.resume(self.trainer)
        self.state = resumed or TrainState()
        self.tracker.start(resumed.step if resumed else None)
        try:
            if resumed is None:
                # Evaluating and saving once at the start shows an out-of-memory or disk problem in the first minute.
                self._evaluate()
                self._save()
            elif resumed.step:
                self.tracker.say(f"resuming after step {resumed.step} of {self.schedule.total_steps}")
            self._loop()
        finally:
            self.tracker.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.state

    def _loop(self) -> None:
        processes, state, total, window = self.processes, self.state, self.schedule.total_steps, _Window()
        for step in range(state.step, total if state.stop is None else 0):
            batch = self.batches.at(step, processes.rank, processes.processes, processes.micro)
            count, tokens = (sum(part[key] for part in batch) for key in ("count", "tokens"))
            count, tokens, asked = processes.sum(count, tokens, self.asked_to_stop)
            if count == 0:
                raise UserError(f"step {step} has no valid target: the loss would be undefined; look at the data or the masking")
            loss, norm = self.trainer.step(batch, step, self.schedule.at(step), count)
            self._finite("gradient norm", norm)
            window.add(loss, count, tokens)
            state.step = step + 1
            evaluate = state.step % self.evaluate_every == 0 or state.step == total
            save = bool(asked) or state.step % self.checkpoint_every == 0 or state.step == total
            if evaluate or save or state.step % LOG_EVERY == 0:
                # Before anything is kept: a loss that is not finite reaches neither weights nor checkpoint.
                self._log(window, norm, self.schedule.at(step))
            if evaluate:
                self._evaluate()
                (asked,) = processes.sum(asked + self.asked_to_stop)
            if save or asked or state.stop:
                self._save()
            if asked:
                self.tracker.say(f"asked to stop: checkpoint of step {state.step} saved; run again to go on")
                raise SystemExit(PREEMPTED)
            if state.stop:
                self.tracker.say(state.stop)
                return
            if evaluate or save:
                window.clear()

    def _finite(self, name: str, value: float | None) -> None:
        if value is not None and not math.isfinite(value):
            kept = self.checkpoints.steps()
            raise UserError(
                f"the {name} is not finite at step {self.state.step}: lower train.learning_rate or raise train.warmup"
                + (f"; the checkpoint of step {kept[-1]} is intact" if kept else "")
            )

    def _log(self, window: _Window, norm: float | None, learning_rate: float) -> None:
        (loss,) = self.processes.sum(window.loss)
        loss /= window.count
        self._finite("loss", loss)
        state, seconds = self.state, window.seconds()
        state.seconds += seconds
        speed = window.tokens / seconds
        self.tracker.record(
            state, loss=loss, learning_rate=learning_rate, tokens_per_second=speed, grad_norm=norm, seconds=state.seconds
        )
        self.tracker.advance(state, loss, speed)
        window.clear()

    def _evaluate(self) -> None:
        state, train = self.state, self.processes.train
        metrics = self.judge.evaluate(self.trainer.model, self.processes)
        for name, number in metrics.items():
            self._finite(f"validation {name}", number)
        self.tracker.record(state, validation=metrics)
        self.tracker.say(f"step {state.step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if state.step == 0:
            state.initial = metrics
            self._keep_weights()
            return
        value, stopping = metrics[self.judge.metric], train.early_stopping
        gained = self.judge.gain(value, state.best) > (stopping.min_delta if stopping else 0.0)
        if gained:
            state.best, state.best_step = value, state.step
        state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
        if stopping and state.evaluations_without_gain >= stopping.patience:
            state.stop = (
                f"early stopping at step {state.step}: {self.judge.metric} has not improved for {stopping.patience} evaluations; "
                f"best {state.best:.4g} at step {state.best_step}"
            )
        if gained if train.keep == "best" else state.step == self.schedule.total_steps or state.stop:
            self._keep_weights()

    def _keep_weights(self) -> None:
        self.state.weights_step = self.state.step
        weights = self.trainer.weights()
        if self.processes.main:
            part = self.weights.with_suffix(".tmp")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            self.save(part, weights)
            publish(part, self.weights)
        self.processes.barrier()

    def _save(self) -> None:
        self.checkpoints.save(self.trainer, self.state)
        if self.processes.main:
            needed = self.checkpoints.weights_steps()
            for step in step_numbers(self.weights.parent):
                if step not in needed:
                    shutil.rmtree(self.weights.with_name(f"step-{step:08d}"))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.asked_to_stop = True


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

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)
