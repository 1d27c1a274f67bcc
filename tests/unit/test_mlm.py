"""Masked language modelling: frequencies, isolation of packed documents, parity with Hugging Face."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.models import ScratchConfig, build_model
from engine.models.attention import packed_mask
from engine.objectives.mlm import IGNORED, Config, Objective, predict_frequencies
from engine.randomness import generator
from tests.unit.models import tiny_masked_lm

SPECIAL = [0, 1, 2, 3, 4]
MASK = 4


def objective(vocabulary=1000):
    return Objective(Config(), vocabulary, MASK, SPECIAL)


def test_masking_takes_15_percent_and_splits_them_80_10_10():
    tokens = np.random.default_rng(0).integers(5, 1000, 400_000)
    corrupted, labels = objective().corrupt(tokens, generator(1, "mask")).values()
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.003)
    assert (corrupted[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.005)
    kept = (corrupted == tokens)[chosen].mean()
    assert kept == pytest.approx(0.1, abs=0.005)
    assert 1 - kept - (corrupted[chosen] == MASK).mean() == pytest.approx(0.1, abs=0.005)
    assert (corrupted[~chosen] == tokens[~chosen]).all()
    assert (labels[chosen] == tokens[chosen]).all()


def test_special_tokens_are_neither_predicted_nor_drawn_as_replacement():
    tokens = np.resize(np.array([*SPECIAL, 7]), 60_000)
    corrupted, labels = objective().corrupt(tokens, generator(1, "mask")).values()
    assert (labels[np.isin(tokens, SPECIAL)] == IGNORED).all()
    changed = (corrupted != tokens) & (corrupted != MASK)
    assert changed.any()
    assert not np.isin(corrupted[changed], SPECIAL).any()


def test_the_same_counter_masks_alike_and_another_one_differently():
    tokens = np.random.default_rng(0).integers(5, 1000, 500)
    first, again, other = (objective().corrupt(tokens, generator(*key))["input_ids"] for key in [(1, 2), (1, 2), (1, 3)])
    assert (first == again).all()
    assert (first != other).any()


def packed_batch(documents, length):
    ids, positions, segments = (torch.zeros(1, length, dtype=torch.int64) for _ in range(3))
    at = 0
    for number, document in enumerate(documents, 1):
        ids[0, at : at + len(document)] = torch.tensor(document)
        positions[0, at : at + len(document)] = torch.arange(len(document))
        segments[0, at : at + len(document)] = number
        at += len(document)
    return ids, positions, segments


def logits_of(model, documents, length=24):
    ids, positions, segments = packed_batch(documents, length)
    return model(input_ids=ids, position_ids=positions, attention_mask=packed_mask(segments, model.dtype)).logits[0]


def test_changing_one_packed_document_leaves_the_others_logits_unchanged():
    model = tiny_masked_lm()
    documents = [[2, 10, 11, 12, 3], [2, 20, 21, 3], [2, 30, 31, 32, 33, 34, 3]]
    with torch.no_grad():
        before = logits_of(model, documents)
        after = logits_of(model, [documents[0], [2, 40, 41, 3], documents[2]])
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[9:16], after[9:16])
    assert not torch.allclose(before[5:9], after[5:9])


def test_a_packed_document_gets_the_logits_that_it_gets_alone():
    model = tiny_masked_lm()
    documents = [[2, 10, 11, 12, 3], [2, 20, 21, 3]]
    with torch.no_grad():
        packed = logits_of(model, documents)
        alone = model(input_ids=torch.tensor([documents[1]])).logits[0]
    torch.testing.assert_close(packed[5:9], alone, rtol=1e-5, atol=1e-6)


def test_loss_and_logits_equal_those_of_hugging_face():
    model = tiny_masked_lm()
    ids = torch.tensor([[2, 10, 4, 12, 13, 4, 3, 0, 0]])
    labels = torch.tensor([[IGNORED, IGNORED, 11, IGNORED, 33, 14, IGNORED, IGNORED, IGNORED]])
    segments = (ids != 0).long()
    batch = {"input_ids": ids, "position_ids": torch.arange(9)[None], "segments": segments, "labels": labels}
    theirs = model(input_ids=ids, attention_mask=segments, labels=labels)
    total, count = objective(64).loss(model, batch)
    assert count == 3
    torch.testing.assert_close(total / count, theirs.loss, rtol=1e-6, atol=1e-6)


def test_a_new_model_predicts_every_token_as_often_as_the_corpus_has_it():
    model = tiny_masked_lm()
    tokens = np.repeat(np.arange(8), np.arange(8))
    predict_frequencies(model, SimpleNamespace(tokens=tokens))
    bias = model.cls.predictions.bias
    expected = np.bincount(tokens, minlength=len(bias)) + 1.0
    np.testing.assert_allclose(bias.detach().exp().numpy(), expected / expected.sum(), rtol=1e-5)


def test_log_frequencies_are_not_rounded_under_autocast():
    shape = ScratchConfig(layers=1, hidden=32, heads=4, positions=16)
    model = build_model(shape, Objective.head, 64, {"pad_token_id": 0}).eval()
    Objective.adapt(model)
    predict_frequencies(model, SimpleNamespace(tokens=np.repeat(np.arange(64), np.arange(64) ** 2)))
    bias = model.cls.predictions.bias
    hidden = torch.zeros(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model.cls.predictions.decoder(hidden)
    assert torch.equal(scores, bias.expand(3, -1))
