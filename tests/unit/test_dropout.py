"""Dropout on CPUs: torch's distribution, torch's gradients, another way to draw."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from engine.models.dropout import ATTENTION, LEVELS, Dropout, cheapen, dropout
from tests.unit.models import tiny_classifier


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_asked_share_is_dropped_and_the_expectation_stays(probability, dtype):
    torch.manual_seed(0)
    values = torch.ones(1_000_003, dtype=dtype)
    dropped = dropout(values, probability, training=True)
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 1e6) ** 0.5)
    kept = dropped[dropped != 0].unique()
    assert len(kept) == 1
    assert kept.item() == pytest.approx(1 / (1 - probability), rel=2e-4 if dtype == torch.float32 else 2**-8)


def test_places_are_dropped_independently_of_their_neighbours_and_of_the_next_call():
    torch.manual_seed(0)
    first, second = (dropout(torch.ones(400_000), 0.5, training=True) == 0 for _ in range(2))
    for lag in (1, 2, 3, 4, 8):
        assert (first[lag:] & first[:-lag]).double().mean().item() == pytest.approx(0.25, abs=5e-3)
    assert (first & second).double().mean().item() == pytest.approx(0.25, abs=5e-3)


def test_the_gradient_goes_where_the_values_went():
    torch.manual_seed(0)
    values = torch.randn(7, 5, requires_grad=True)
    dropped = dropout(values, 0.3, training=True)
    dropped.backward(torch.full_like(dropped, 2.0))
    torch.testing.assert_close(values.grad, torch.where(dropped == 0, 0.0, 2.0 * (dropped / values).detach()))
    scale = LEVELS / (LEVELS - round(0.3 * LEVELS))
    torch.testing.assert_close(dropped[dropped != 0], (scale * values)[dropped != 0])


def test_the_same_seed_drops_the_same_places_also_when_activations_are_computed_again():
    module = Dropout(0.4).train()
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(module(torch.ones(33)))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    values = torch.ones(33, requires_grad=True)
    result = checkpoint(module, values, use_reentrant=False)
    result.sum().backward()
    assert torch.equal(values.grad, result.detach())


@pytest.mark.parametrize("probability", [0.0, 1e-9, 1.0])
def test_nothing_and_everything_can_be_dropped(probability):
    values = torch.randn(10)
    expected = torch.zeros(10) if probability == 1.0 else values
    torch.testing.assert_close(dropout(values, probability, training=True), expected)
    assert torch.equal(dropout(values, 0.5, training=False), values)


def test_a_model_keeps_its_weights_names_and_answers_in_evaluation_and_drops_in_training():
    model, plain = tiny_classifier(), tiny_classifier()
    cheapen(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {Dropout}
    ids = torch.arange(5, 15)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_our_attention_gives_the_logits_and_gradients_of_transformers_own():
    ids = torch.randint(5, 28, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 2 + [0] * 7])
    results = []
    for ours in (False, True):
        model = tiny_classifier(initializer_range=0.2)
        if ours:
            cheapen(model)
            assert model.config._attn_implementation == ATTENTION
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.sum().backward()
        results.append((logits.detach(), model.bert.encoder.layer[0].attention.self.query.weight.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_that_was_given_another_attention_keeps_it():
    model = tiny_classifier()
    model.set_attn_implementation("sdpa")
    cheapen(model)
    assert model.config._attn_implementation == "sdpa"
