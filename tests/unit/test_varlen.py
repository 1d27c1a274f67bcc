"""Attention within documents by their lengths gives what a mask gives."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packed import ends_of
from engine.evaluate import ALONE, Alone
from engine.models import attention, varlen
from engine.models.families import FAMILIES
from engine.objectives import _tokens, clm
from engine.training.processes import Processes
from tests.unit.test_packed_families import PACKED, batch_of, model_of, packed_of

DOCUMENTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27]]
ONE_SIDE = [name for name in PACKED if len(FAMILIES[name].stacks) == 1]


def by_documents(query, key, value, ends, longest, dropout, causal, scale, window):
    """What `varlen.flash` says that it does, one document after the other."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    made = []
    for first, end in itertools.pairwise(ends.tolist()):
        assert 0 < end - first <= longest
        scores = torch.einsum("qhd,khd->hqk", query[first:end], key[first:end]) * (scale or query.shape[-1] ** -0.5)
        back = torch.arange(end - first)[:, None] - torch.arange(end - first)[None]
        unseen = (back < 0) & causal | (back.abs() > (longest if window is None else window))
        made.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), value[first:end]))
    return torch.cat(made)


def with_ends(documents, length=40):
    batch = batch_of(documents, documents, length)
    return batch | {"ends": torch.from_numpy(ends_of(batch["segments"].numpy()))}


@pytest.mark.parametrize("family", ONE_SIDE)
def test_scores_and_gradients_are_those_of_the_mask(family, monkeypatch):
    calls = []
    monkeypatch.setattr(varlen, "flash", lambda *options: calls.append(options[4:]) or by_documents(*options))
    monkeypatch.setattr(attention, "takes_lengths", lambda model, length: model.config._attn_implementation == varlen.ATTENTION)
    model = model_of(family)
    if not getattr(model, "_supports_sdpa", False):
        pytest.skip(f"transformers has no fused attention for {family}")
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if getattr(module, "sliding_window", None):  # counts the token itself; the configuration was changed after it was built
            module.sliding_window = model.config.sliding_window + 1
    found = []
    for lengths in (False, True):
        if lengths:
            varlen.attend_by_lengths(model)
        model.zero_grad()
        scores = _tokens.Objective.logits(None, model, with_ends(DOCUMENTS))
        scores.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([scores.detach(), *(gradient.clone() for gradient in gradients)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert len(calls) == model.config.num_hidden_layers, "every layer goes by lengths"


def test_a_mask_is_used_where_no_lengths_are_given(monkeypatch):
    model = model_of("bert")
    model.set_attn_implementation("sdpa")
    ids, mask = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        varlen.attend_by_lengths(model)
        assert model.config._attn_implementation == varlen.ATTENTION
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_lengths_are_for_half_precision_and_long_rows():
    model = model_of("bert")
    model.set_attn_implementation("sdpa")
    assert not varlen.takes_lengths(model, 512)
    varlen.attend_by_lengths(model)
    assert not varlen.takes_lengths(model, 512), "fp32"
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen.takes_lengths(model, 512) and not varlen.takes_lengths(model, 128)
    assert varlen.takes_lengths(model.half(), 512)


def test_an_evaluation_goes_by_lengths_where_a_step_does(monkeypatch):
    calls = []
    monkeypatch.setattr(varlen, "flash", lambda *options: calls.append(options[4:]) or by_documents(*options))
    monkeypatch.setattr(varlen, "SHORTEST", 40)
    model = model_of("gpt2")
    model.set_attn_implementation("sdpa")
    varlen.attend_by_lengths(model)
    packed = packed_of([list(range(10, 60))] * 6 + [list(range(20, 50))] * 6, clm.Objective(), 40)

    class Half(Alone):
        def autocast(self):
            return torch.autocast("cpu", torch.bfloat16)

    exact = packed.evaluate(model, ALONE)
    assert not calls, "fp32 goes by the mask"
    half = packed.evaluate(model, Half())
    assert calls and half["predicted_tokens"] == exact["predicted_tokens"]
    assert half["loss"] == pytest.approx(exact["loss"], rel=5e-3)


@pytest.mark.parametrize(("cuda", "precision", "enabled"), [(True, "bf16", True), (True, "fp32", False), (False, "bf16", False)])
def test_a_gpu_is_evaluated_as_it_is_trained_and_a_cpu_in_fp32(cuda, precision, enabled):
    ranks = SimpleNamespace(device=torch.device("cpu"), cuda=cuda, precision=precision)
    with Processes.autocast(ranks):
        assert torch.is_autocast_enabled("cpu") == enabled


def test_an_attention_that_was_chosen_stays():
    model = model_of("bert")
    varlen.attend_by_lengths(model)
    assert model.config._attn_implementation == "eager", "as deterministic training chooses it"


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_ends_cut_the_rows_where_documents_change(draws):
    segments = np.cumsum(np.asarray(draws) == 0, axis=1)
    ends = ends_of(segments)
    assert ends.dtype == np.int32 and ends[0] == 0 and ends[-1] == segments.size and (np.diff(ends) > 0).all()
    for first, end in itertools.pairwise(ends):
        assert first // 6 == (end - 1) // 6, "in one row"
        assert len(set(segments.flatten()[first:end])) == 1
        assert end % 6 == 0 or segments.flatten()[end] != segments.flatten()[first], "whole"


def test_the_operator_takes_what_it_is_given():
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[:5] == ["query", "key", "value", "cum_seq_q", "cum_seq_k"]
    assert names[5:10] == ["max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names[10:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("causal", "window", "groups"), [(False, None, 4), (True, None, 2), (True, 5, 4), (False, 7, 4)])
def test_the_operator_gives_what_is_said_here(causal, window, groups):
    torch.manual_seed(0)
    ends = torch.tensor([0, 7, 8, 60, 128, 200], dtype=torch.int32)
    shapes = ((200, 4, 32), (200, groups, 32), (200, groups, 32))
    states = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    expected = by_documents(*(state.float() for state in states), ends, 128, 0.0, causal, None, window)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), states)
    moved = [state.detach().cuda().requires_grad_() for state in states]
    found = varlen.flash(*moved, ends.cuda(), 128, 0.0, causal, None, window)
    gradients = torch.autograd.grad((found.float() * weights.cuda()).sum(), moved)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close([part.cpu() for part in gradients], list(wanted), rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_dropout_drops_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    ends = torch.arange(0, 4097, 256, dtype=torch.int32, device="cuda")
    query, key = (torch.randn(4096, 2, 32, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    value = torch.ones_like(query)
    dropped = varlen.flash(query, key, value, ends, 256, 0.5, False, None, None)
    assert dropped.float().std() > 0.01 and abs(dropped.float().mean().item() - 1) < 0.02
