"""Learning-rate schedules: pure functions of the optimizer step, and of a weight's height below the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every optimizer step, 0-based."""

    shape: str
    peak: float
    warmup_steps: int
    total_steps: int
    layer_decay: float = 1.0
    unfreeze_steps: int = 0
    """Optimizer steps until the lowest weights train."""
    lowest: int = 0
    """Depth of the lowest weights, see `engine.training.tuning.depth_of`."""
    cooldown_steps: int = 0
    """Last optimizer steps, over which `wsd` falls."""

    @classmethod
    def of(cls, train: TrainConfig, steps_per_epoch: int, lowest: int = 0) -> Schedule:
        """Builds the schedule of `train` over data that give `steps_per_epoch` optimizer steps."""
        total = train.steps or max(1, math.ceil((train.epochs or 0) * steps_per_epoch))
        warmup, unfreeze, cooldown = (round(share * total) for share in (train.warmup, train.unfreeze, train.cooldown))
        return cls(train.schedule, train.learning_rate, warmup, total, train.layer_decay, unfreeze, lowest, cooldown)

    def at(self, step: int, depth: int = 0) -> float:
        """Returns the learning rate used by optimizer step `step` (0-based) for weights `depth` places below the head."""
        # The head trains at once, the lowest weights last.
        if depth and step * self.lowest < depth * self.unfreeze_steps:
            return 0.0
        return self._peak_at(step) * self.layer_decay**depth

    def _peak_at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        if self.shape == "wsd":
            cooled = (step - self.total_steps + self.cooldown_steps) / max(1, self.cooldown_steps)
            return self.peak * (1 - math.sqrt(max(0.0, cooled)))
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * (0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done)
