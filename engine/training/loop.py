"""THE loop: optimizer steps, evaluations, checkpoints. Nothing in it asks which task, which backend, which ZeRO stage."""

from __future__ import annotations

import functools
import math
import shutil
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.data.batches import Batch
from engine.errors import PREEMPTED, UserError
from engine.stages import heartbeat
from engine.stages.stage import discard, publish
from engine.training.ahead import Ahead
from engine.training.checkpoint import Checkpoints, TrainState, step_numbers
from engine.training.processes import Asked, Processes
from engine.training.schedule import Schedule
from engine.training.tracking import LOG_EVERY, Tracker
from engine.training.trainer import Loss, Trainer

SPIKE_WINDOW = 50
"""Steps whose median loss a spike is measured against."""
SAME_LOGITS = 1e-2
"""Largest difference of logits, relative to the largest one, between a model, perhaps in fp16, and its re-opened weights."""


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
    probe: Callable[[Any], list[float]]
    """A few logits of the model: what its saved weights have to give again when they are re-opened."""

    def gain(self, new: float, best: float | None) -> float:
        """By how much `new` is better than `best`; infinite when there is no best yet."""
        if best is None:
            return math.inf
        return new - best if self.higher_is_better else best - new


def same_logits(found: list[float], expected: list[float], weights: Path) -> None:
    """Compares the logits of re-opened weights with those of the run that saved them.

    Raises:
        RuntimeError: they differ by more than rounding: a tensor is empty, missing or another one.
    """
    largest = max(map(abs, expected), default=0.0)
    if len(found) != len(expected) or any(
        not abs(a - b) <= SAME_LOGITS * max(1.0, largest) for a, b in zip(found, expected, strict=True)
    ):
        raise RuntimeError(f"{weights}: the re-opened weights do not give the logits of the run that saved them: do not use them")


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
        self.trainer = Trainer(processes, model, loss)
        self.schedule = Schedule.of(train, batches.steps_per_epoch, max(self.trainer.depths))
        self.trainer.seed = seed
        self.checkpoints = Checkpoints(directory / "checkpoints", processes, train.keep_checkpoints)
        self.tracker = Tracker(title, directory, self.schedule.total_steps, processes.main)
        every = train.evaluate_every
        if every is None:
            every = batches.steps_per_epoch
        self.evaluate_every = max(1, round(every * self.schedule.total_steps)) if isinstance(every, float) else every
        self.checkpoint_every = train.checkpoint_every or self.evaluate_every
        self.state = TrainState()
        self.window = _Window()
        self.ahead = Ahead(
            lambda step: batches.at(step, processes.rank, processes.processes, processes.micro),
            pin=processes.cuda,
            workers=processes.batch_workers,
        )

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
        try:
            resumed = self.checkpoints.resume(self.trainer)
            self.state = resumed or TrainState()
            self.tracker.start(resumed.step if resumed else None)
            if resumed is None:
                self._rehearse()
            elif resumed.step:
                self.tracker.say(f"resuming after step {resumed.step} of {self.schedule.total_steps}")
            self._loop()
            self.checkpoints.wait()
        except Asked:
            self._leave()
        finally:
            self.ahead.close()
            self.checkpoints.close()
            self.tracker.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        self.processes.barrier()
        return self.state

    def _rehearse(self) -> None:
        """Evaluates, saves and reloads once, so that an out-of-memory or disk problem shows in the first minute."""
        self._evaluate()
        self._save()
        self.checkpoints.wait()
        self.processes.barrier()
        if self.checkpoints.resume(self.trainer) is None:
            raise UserError(f"{self.checkpoints.directory}: a checkpoint does not read back as it was written: check the disk")

    def _loop(self) -> None:
        state, total = self.state, self.schedule.total_steps
        if state.evaluation_due:
            self._after_step(asked=False)
        while (state := self.state).step < total and state.stop is None:
            asked, problem = self._step(state)
            if problem is None or not self._rolled_back(state, problem):
                self._after_step(asked)
        if state.stop:
            self.tracker.say(state.stop)

    def _step(self, state: TrainState) -> tuple[bool, str | None]:
        """One optimizer step; returns whether some rank was asked to stop, and why the update was left out if it was."""
        processes, step = self.processes, state.step
        self.checkpoints.check()
        heartbeat.beat("data", step)
        batch = self.ahead.at(step + state.data_offset, self.schedule.total_steps - 1 + state.data_offset)
        agreed = processes.summing(*(sum(part[key] for part in batch) for key in ("count", "tokens")), processes.asked)
        largest = self._largest_loss(state)
        rate = functools.partial(self.schedule.at, step)
        loss, norm = self.trainer.step(batch, step, rate, lambda: agreed()[0], largest)
        count, tokens, asked = agreed().tolist()
        if count == 0:
            raise UserError(f"step {step + 1} has no valid target: the loss is undefined; look at the data or the masking")
        state.step = step + 1
        self.window.add(loss, count, tokens, norm, rate())
        return bool(asked), self._problem(loss, count, largest)

    def _largest_loss(self, state: TrainState) -> float:
        """Returns the loss above which the next step counts as a spike."""
        factor, recent = self.processes.train.bad_steps.spike_factor, state.recent_losses
        return math.inf if factor is None or len(recent) < SPIKE_WINDOW else factor * statistics.median(recent)

    def _problem(self, rank_loss: float, count: float, largest: float) -> str | None:
        """Says why the update of the step was left out, or None when it was not."""
        state, factor, finite = self.state, self.processes.train.bad_steps.spike_factor, math.isfinite(self.window.norm)
        if finite and factor is None:
            return None
        loss = self.processes.sum(rank_loss)[0] / count
        if not math.isfinite(loss):
            return "the loss is not finite"
        if factor is not None:
            if loss > largest:
                usual = f"{largest / factor:.4g}, the median of the {SPIKE_WINDOW} steps before"
                return f"the loss of {loss:.4g} is above {factor:g} × {usual}"
            state.recent_losses = [*state.recent_losses, loss][-SPIKE_WINDOW:]
        # An fp16 gradient that overflows is dropped and scaled down by DeepSpeed: nothing is wrong with the step.
        return None if finite or self.processes.precision == "fp16" else "the gradient norm is not finite"

    def _rolled_back(self, state: TrainState, problem: str) -> bool:
        """Deals with a step whose update was left out; returns whether training went back to a checkpoint."""
        policy = self.processes.train.bad_steps
        where = f"step {state.step}: {problem}"
        if policy.action == "stop" or state.bad_steps >= policy.limit:
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            many = f" and train.bad_steps.limit={policy.limit} is reached" if policy.action != "stop" else ""
            raise UserError(
                f"{where}{many}: lower train.learning_rate, raise train.warmup, or set train.bad_steps.action"
                + (f"; the checkpoint of step {kept[-1]} is intact" if kept else "")
            )
        bad = state.bad_steps + 1
        if policy.action == "skip":
            state.bad_steps = bad
            self.tracker.record(state, skipped=problem)
            self.tracker.say(f"{where}: its update was skipped ({bad} of at most {policy.limit})")
            self.window.clear()
            return False
        self.checkpoints.wait()
        self.processes.barrier()
        before = self.checkpoints.resume(self.trainer)
        assert before is not None, "step 0 has a checkpoint"
        before.data_offset, before.bad_steps = state.data_offset + state.step - before.step, bad
        self.state = before
        self.tracker.rewind(before.step)
        self.tracker.record(before, rolled_back=problem, from_step=state.step)
        self.tracker.say(f"{where}: back to step {before.step}, its data are left out ({bad} of at most {policy.limit})")
        self.window.clear()
        return True

    def _after_step(self, asked: bool) -> None:
        """Logs, evaluates and saves what is due after a step.

        Raises:
            Asked: to stop.
        """
        state, total = self.state, self.schedule.total_steps
        evaluate = state.step % self.evaluate_every == 0 or state.step == total
        save = asked or state.step % self.checkpoint_every == 0 or state.step == total
        if self.window.count and (evaluate or save or state.step % LOG_EVERY == 0):
            self._log()
        state.evaluation_due = evaluate
        if evaluate and not asked:
            self._evaluate()
            state.evaluation_due = False
        if (save and not asked) or state.stop:
            self._save()
        if asked:
            raise Asked
        if evaluate or save:
            self.window.clear()

    def _leave(self) -> None:
        """Saves a checkpoint of this step and ends with PREEMPTED; an evaluation that is due waits for the next run."""
        if self.state.step:
            self._save()
            self.checkpoints.wait()
            self.processes.barrier()
            self.tracker.say(f"asked to stop: checkpoint of step {self.state.step} saved; run again to go on")
        raise SystemExit(PREEMPTED)

    def _log(self) -> None:
        state, window, seconds = self.state, self.window, self.window.seconds()
        state.seconds += seconds
        loss, speed = self.processes.sum(window.loss)[0] / window.count, window.tokens / seconds
        self.tracker.record(
            state,
            loss=loss,
            learning_rate=window.learning_rate,
            tokens_per_second=speed,
            grad_norm=window.norm if math.isfinite(window.norm) else None,
            seconds=state.seconds,
            waited_share=self.ahead.waited / seconds,
            **self.processes.device_memory(),
        )
        self.tracker.advance(state, loss, speed)
        window.clear()
        self.ahead.waited = 0.0

    def _evaluate(self) -> None:
        state, train = self.state, self.processes.train
        heartbeat.beat("evaluate", state.step)
        metrics = self.judge.evaluate(self.trainer.model, self.processes)
        for name, number in metrics.items():
            if not math.isfinite(number):
                raise UserError(f"the validation {name} is not finite at step {state.step}: lower train.learning_rate")
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
        state = self.state
        heartbeat.beat("save", state.step)
        state.weights_step, state.probe = state.step, self.judge.probe(self.trainer.model)
        weights, target = self.trainer.weights(), self.weights
        if self.processes.main:
            self.checkpoints.later(lambda: self._write_weights(target, weights))

    def _write_weights(self, target: Path, weights: dict[str, Any]) -> None:
        part = target.with_suffix(".tmp")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self.save(part, weights)
        publish(part, target)

    def _save(self) -> None:
        heartbeat.beat("save", self.state.step)
        self.checkpoints.save(self.trainer, self.state, self._drop_weights)

    def _drop_weights(self) -> None:
        """Removes the weights that no checkpoint names any more."""
        needed = self.checkpoints.weights_steps()
        directory = self.directory / "weights"
        for step in step_numbers(directory):
            if step not in needed:
                discard(directory / f"step-{step:08d}")

    def _on_signal(self, number: int, frame: Any) -> None:
        self.processes.asked = True


class _Window:
    """Sums since the last log record; time spent evaluating and saving is not training time."""

    def __init__(self) -> None:
        self.norm = self.learning_rate = 0.0
        self.clear()

    def clear(self) -> None:
        self.loss = self.count = self.tokens = 0.0
        self.started = time.monotonic()

    def add(self, loss: float, count: float, tokens: float, norm: float, learning_rate: float) -> None:
        """Adds one step: this rank's summed loss; targets and tokens of all ranks; gradient norm and learning rate."""
        self.loss += loss
        self.count += count
        self.tokens += tokens
        self.norm, self.learning_rate = norm, learning_rate

    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)
