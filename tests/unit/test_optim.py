"""Optimizers: weight decay on matrices only, 8-bit state that really is 8 bits, updates as their papers have them."""

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.models.scratch import ScratchConfig, build_model
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer, hidden_matrices
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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "stable_adamw"])
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


RATE, DECAY, BETAS, EPSILON = 0.03, 0.1, (0.9, 0.95), 1e-8


def lamb(weight, mean, square, gradient):
    """Algorithm 2 of arXiv:1904.00962, with the identity as phi; vectors without the ratio."""
    matrix = weight.ndim > 1
    update = mean / (np.sqrt(square) + EPSILON) + (DECAY * weight if matrix else 0)
    ratio = np.sqrt((weight**2).sum()) / np.sqrt((update**2).sum()) if matrix and weight.any() else 1.0
    return weight - RATE * ratio * update


def stable_adamw(weight, mean, square, gradient):
    """Algorithm 2 of arXiv:2304.13013."""
    surprise = np.sqrt((gradient**2 / np.maximum(square, EPSILON**2)).mean())
    rate = RATE / max(1.0, surprise)
    decay = DECAY if weight.ndim > 1 else 0
    return weight - rate * decay * weight - rate * mean / (np.sqrt(square) + EPSILON)


@pytest.mark.parametrize("reference", [lamb, stable_adamw])
def test_updates_are_those_of_the_paper(reference):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(12, 7), torch.nn.Linear(7, 5))
    torch.nn.init.zeros_(layer[1].weight)
    settings = config(optimizer=reference.__name__, learning_rate=RATE, weight_decay=DECAY, betas=BETAS)
    chosen = build_optimizer(layer, settings)[0]
    weights = [parameter.detach().double().numpy().copy() for parameter in layer.parameters()]
    averages = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in weights]
    clipped = 0
    for step in range(1, 9):
        for number, parameter in enumerate(layer.parameters()):
            parameter.grad = torch.randn_like(parameter) * (30.0 if step == 6 else 1.0)
            gradient, (first, second) = parameter.grad.double().numpy(), BETAS
            mean, square = averages[number]
            averages[number] = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2
            mean, square = averages[number][0] / (1 - first**step), averages[number][1] / (1 - second**step)
            clipped += np.sqrt((gradient**2 / square).mean()) > 1.5
            weights[number] = reference(weights[number], mean, square, gradient)
        chosen.step()
    assert clipped >= 4
    for parameter, weight in zip(layer.parameters(), weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=2e-5, atol=1e-6)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else():
    model, other = tiny_classifier(), tiny_classifier()
    other.load_state_dict(model.state_dict())
    hidden = hidden_matrices(model)
    assert len(hidden) == 6 * model.config.num_hidden_layers
    assert not any("embeddings" in name or name.startswith(("classifier", "bert.pooler")) for name in hidden)
    chosen = build_optimizer(model, config(optimizer="muon", learning_rate=RATE, weight_decay=DECAY))[0]
    named = dict(other.named_parameters())
    theirs = [
        torch.optim.Muon([named[name] for name in named if name in hidden], RATE, DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [named[name] for name in named if name not in hidden and named[name].ndim > 1], RATE, weight_decay=DECAY
        ),
        torch.optim.AdamW([named[name] for name in named if named[name].ndim < 2], RATE, weight_decay=0.0),
    ]
    for step in range(4):
        if step == 2:  # what was loaded is what is changed
            chosen.load_state_dict(chosen.state_dict())
        for group in chosen.param_groups:
            group["lr"] = RATE / (step + 1)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        chosen.step()
        for part in theirs:
            part.param_groups[0]["lr"] = RATE / (step + 1)
            part.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-7)
    kept = {name: chosen.state[parameter] for name, parameter in model.named_parameters()}
    assert all(("momentum_buffer" in state) == (name in hidden) for name, state in kept.items())


def test_tables_and_biases_in_layers_are_not_for_muon():
    for family in ("xlnet", "t5"):
        model = build_model(
            ScratchConfig(family=family, layers=2, hidden=32, heads=4, positions=64),
            "AutoModelForSequenceClassification",
            64,
            {"pad_token_id": 0, "eos_token_id": 1},
        )
        names = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
        left = names - hidden_matrices(model)
        assert any("r_w_bias" in name or "relative_attention_bias" in name for name in left)
        assert hidden_matrices(model) and not any("bias" in name for name in hidden_matrices(model))


def test_a_model_without_layers_is_not_for_muon():
    with pytest.raises(UserError, match=r"train\.optimizer=muon: the model has no layers with matrices"):
        build_optimizer(torch.nn.Linear(4, 4), config(optimizer="muon"))


@pytest.mark.parametrize("optimizer", ["lamb", "muon", "stable_adamw"])
def test_what_has_no_gradient_stays_as_it_is(optimizer):
    model = tiny_classifier()
    chosen = build_optimizer(model, config(optimizer=optimizer, weight_decay=0.5))[0]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_8_bit_optimizer_keeps_large_moments_in_8_bits():
    layer = torch.nn.Linear(128, 64)
    chosen = build_optimizer(layer, config(optimizer="adamw_8bit"))[0]
    layer(torch.ones(2, 128)).sum().backward()
    chosen.step()
    moments = [value for value in chosen.state[layer.weight].values() if torch.is_tensor(value) and value.shape == (64, 128)]
    assert len(moments) == 2 and all(moment.dtype == torch.uint8 for moment in moments)
