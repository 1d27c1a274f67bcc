"""Optimizers with decoupled weight decay on matrices only."""

from __future__ import annotations

import torch

from engine.errors import UserError
from engine.train_config import TrainConfig


def build_optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimizer that `train` names; vectors (biases, normalization weights) get no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # ZeRO-3 has already sharded the weights here: `ds_shape` is the full one.
    dimensions = [len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in trained]
    groups = [
        {"params": [p for p, d in zip(trained, dimensions, strict=True) if d >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p, d in zip(trained, dimensions, strict=True) if d < 2], "weight_decay": 0.0},
    ]
    if train.optimizer == "adamw_8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise UserError("train.optimizer=adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use adamw") from None
        return bitsandbytes.optim.AdamW8bit(groups, lr=train.learning_rate, betas=train.betas)
    # One fused pass over each tensor: several times faster than the default on CPUs, the same mathematics.
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
