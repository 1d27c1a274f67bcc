"""Learning-rate schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.train_config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every optimizer step, 0-based."""

    shape: str
    peak: float
    warmup_steps: int
    total_steps: int

    @classmethod
    def of(cls, train: TrainConfig, steps_per_epoch: int) -> Schedule:
        """Builds the schedule of `train` over data that give `steps_per_epoch` optimizer steps."""
        total = train.steps or max(1, math.ceil((train.epochs or 0) * steps_per_epoch))
        return cls(train.schedule, train.learning_rate, round(train.warmup * total), total)

    def at(self, step: int) -> float:
        """Returns the learning rate used by optimizer step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * (0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done)
