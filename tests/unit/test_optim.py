"""Optimizers: weight decay on matrices only, 8-bit state that really is 8 bits."""

import pytest
import torch

from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from tests.unit.models import tiny_classifier


def config(**changes):
    return TrainConfig(steps=1, **changes)


def test_only_matrices_decay():
    model = tiny_classifier()
    decayed, exempt = build_optimizer(model, config(weight_decay=0.1))[0].param_groups
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0.0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_quadratic_is_minimised(optimizer):
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64)
    target = torch.randn(64, 128) * 0.1
    chosen = build_optimizer(layer, config(optimizer=optimizer, learning_rate=0.02, weight_decay=0.0))[0]
    losses = []
    for _ in range(60):
        loss = ((layer.weight - target) ** 2).sum() + (layer.bias**2).sum()
        losses.append(float(loss))
        loss.backward()
        chosen.step()
        chosen.zero_grad()
    assert losses[-1] < 0.05 * losses[0]


def test_the_8_bit_optimizer_keeps_large_moments_in_8_bits():
    layer = torch.nn.Linear(128, 64)
    chosen = build_optimizer(layer, config(optimizer="adamw_8bit"))[0]
    layer(torch.ones(2, 128)).sum().backward()
    chosen.step()
    moments = [value for value in chosen.state[layer.weight].values() if torch.is_tensor(value) and value.shape == (64, 128)]
    assert len(moments) == 2 and all(moment.dtype == torch.uint8 for moment in moments)
