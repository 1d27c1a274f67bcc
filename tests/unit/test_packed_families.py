"""Packed rows of every family that takes them: documents are alone, scores and losses those of transformers, sizes as asked."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from engine.data.corpus import Corpus
from engine.data.packed import PackedBatches
from engine.models.families import FAMILIES
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives import REGISTRY, Frame, _tokens, clm
from engine.randomness import generator

HEAD = {"masked": "AutoModelForMaskedLM", "next": "AutoModelForCausalLM", "rewritten": "AutoModelForSeq2SeqLM"}
PACKED = [name for name, row in FAMILIES.items() if row.packed and len(row.stacks) == 1]
EVERY = pytest.mark.parametrize("family", PACKED)
BUILT = [name for name, row in FAMILIES.items() if row.packed]
PAD, BOS, EOS = 1, 2, 3
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "cls_token_id": BOS, "sep_token_id": EOS}
DOCUMENTS = [list(range(10, 22)), list(range(30, 50)), [50, 51, 52]]
WINDOW = 4


def model_of(family, vocabulary=64, **changes):
    torch.manual_seed(0)
    operation = next(name for name in HEAD if FAMILIES[family].why_not(name) is None)
    shape = ScratchConfig(family=family, layers=2, hidden=32, heads=4, intermediate=48, positions=40)
    model = build_model(shape, HEAD[operation], vocabulary, IDS).eval()
    if model.config.model_type in ("modernbert", "mistral"):
        # Shorter than the documents: what a layer with a window does not see must stay unseen.
        model.config.sliding_window = WINDOW
    return model


def objective_of(family):
    return clm.Objective() if FAMILIES[family].causal else REGISTRY.module("mlm").Objective


def batch_of(documents, labels, length=40):
    batch = {name: torch.zeros(1, length, dtype=torch.int64) for name in ("input_ids", "position_ids", "segments")}
    batch["input_ids"] += PAD
    batch["labels"] = torch.full((1, length), _tokens.IGNORED)
    at = 0
    for number, (document, wanted) in enumerate(zip(documents, labels, strict=True), 1):
        place = slice(at, at := at + len(document))
        values = (document, range(len(document)), [number] * len(document), wanted)
        for name, column in zip(batch, values, strict=True):
            batch[name][0, place] = torch.tensor(list(column))
    return batch | {"predicted": torch.from_numpy(_tokens.chosen(batch["labels"].numpy()))}


@EVERY
def test_a_packed_document_gets_the_scores_that_it_gets_alone_and_those_of_transformers_own_class(family):
    model = model_of(family)
    everything = batch_of(DOCUMENTS, DOCUMENTS)
    with torch.no_grad():
        packed = _tokens.Objective.logits(None, model, everything)
        alone = [
            model(input_ids=torch.tensor([document]), attention_mask=torch.ones(1, len(document))).logits[0]
            for document in DOCUMENTS
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", BUILT)
def test_a_new_model_has_the_size_that_was_asked_for(family):
    model = model_of(family)
    row = FAMILIES[family]
    assert model.config.num_hidden_layers == 2 and model.config.num_attention_heads == 4
    assert getattr(model.config, row.hidden) == 32
    assert {getattr(model.config, name) for name in row.neurons} == {48}
    assert {getattr(model.config, stack.count) for stack in row.stacks} == {2}
    assert {getattr(model.config, stack.heads) for stack in row.stacks} == {4}
    assert model.get_input_embeddings().num_embeddings == 64
    assert max(parameter.shape[-1] for parameter in model.base_model.parameters() if parameter.dim() > 1) <= 128
    assert model.config.pad_token_id == PAD


@pytest.mark.parametrize("family", [name for name in PACKED if FAMILIES[name].causal])
def test_the_loss_of_the_next_token_is_that_of_transformers(family):
    model = model_of(family)
    ids = torch.tensor([DOCUMENTS[0]])
    columns = clm.Objective().corrupt(np.array(DOCUMENTS[0]), generator(0))
    total, count = clm.Objective().loss(model, batch_of([columns["input_ids"]], [columns["labels"]]))
    assert count == len(DOCUMENTS[0]) - 1
    torch.testing.assert_close(total / count, model(input_ids=ids, labels=ids).loss, rtol=1e-5, atol=1e-6)


def test_scores_in_parts_give_the_same_loss_and_the_same_gradients(monkeypatch):
    whole, parts = model_of("gpt2"), model_of("gpt2")
    batch = batch_of(DOCUMENTS, DOCUMENTS)
    losses = [clm.Objective().loss(whole, batch)[0]]
    monkeypatch.setattr(_tokens, "CHUNK_SCORES", 64 * 8)
    losses.append(clm.Objective().loss(parts, batch)[0])
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Tokens:
    pad_token_id = PAD
    bos_token_id = BOS
    eos_token_id = EOS
    cls_token_id = 4
    sep_token_id = 5


def packed_of(documents, objective, length):
    tokens = np.concatenate(documents).astype("<u2")
    corpus = Corpus(tokens, np.cumsum([len(document) for document in documents]))
    return PackedBatches({"": [corpus]}, objective, Tokens, length, 2, 0)


def pieces_of(documents, objective, length):
    packed = packed_of(documents, objective, length)
    found = []
    for row in range(packed.rows):
        columns = packed.row(0, row)
        for number in range(1, columns["segments"].max() + 1):
            found.append({name: values[columns["segments"] == number].tolist() for name, values in columns.items()})
    return sorted(found, key=lambda piece: [token for token in piece["input_ids"] if token > 9])


def test_documents_begin_and_end_once_however_they_are_cut():
    documents = [list(range(10, 15)), list(range(20, 34)), [40]]
    found = pieces_of(documents, clm.Objective(), 8)
    assert [piece["input_ids"] for piece in found] == [
        [BOS, *range(10, 15), EOS],
        [BOS, *range(20, 26)],
        list(range(26, 32)),
        [32, 33, EOS],
        [BOS, 40, EOS],
    ]
    for piece in found:
        assert piece["labels"] == [*piece["input_ids"][1:], _tokens.IGNORED]
        assert piece["position_ids"] == list(range(len(piece["input_ids"])))


def test_without_a_token_for_the_beginning_that_of_the_end_stands_there():
    class Ends(Tokens):
        bos_token_id = None

    assert clm.Objective.frame(Ends) == Frame((EOS,), (EOS,), pieces=False)


def test_pieces_of_an_encoder_are_framed_each():
    module = REGISTRY.module("mlm")
    objective = module.Objective(module.Config(mask=0.15), 64, 6, [0, PAD, 4, 5, 6])
    found = pieces_of([list(range(20, 34))], objective, 8)
    assert [len(piece["input_ids"]) for piece in found] == [8, 8, 4]
    assert {(piece["input_ids"][0], piece["input_ids"][-1]) for piece in found} == {(4, 5)}


@pytest.mark.parametrize(("family", "auto"), [("gpt2", AutoModelForCausalLM), ("roberta", AutoModelForMaskedLM)])
def test_a_new_model_is_saved_as_transformers_reads_it(tmp_path, family, auto):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([DOCUMENTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(auto.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
