"""Next sentences and the order of sentences: what pairs are made of, their packing, parity with Hugging Face."""

import numpy as np
import pytest
import torch

from engine.data.corpus import Corpus, CorpusWriter
from engine.data.packed import PackedBatches
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives import nsp, sop
from engine.objectives._tokens import IGNORED
from tests.unit.models import tiny_tokenizer

CLS, SEP, PAD, MASK, VOCABULARY = 2, 3, 0, 4, 20_000
LENGTH = 48
MODULES = {"nsp": nsp, "sop": sop}
FAMILY = {"nsp": "bert", "sop": "albert"}


class Tokenizer:
    pad_token_id, cls_token_id, sep_token_id = PAD, CLS, SEP


@pytest.fixture(scope="module")
def corpus():
    """Documents of 2 to 90 tokens, all of them different, in sentences of 5."""
    lengths = np.random.default_rng(0).integers(2, 91, 400)
    ends = np.cumsum(lengths)
    starts = np.concatenate([[0], ends[:-1]])
    sentences = np.concatenate([np.arange(first + 5, end, 5) for first, end in zip(starts, ends, strict=True)])
    return Corpus(np.arange(5, 5 + ends[-1], dtype=np.int64), ends, {}, sentences.astype(np.int64))


def batches_of(corpus, kind, seed=1):
    objective = MODULES[kind].Objective(MODULES[kind].Config(mask=1e-9), VOCABULARY, MASK, [0, 1, 2, 3, 4])
    return PackedBatches({"": [corpus]}, objective, Tokenizer, LENGTH, 8, seed)


def pairs_of(batches, epoch=0):
    """Yields (label, first part, second part) of all pairs of an epoch; masking is off."""
    for number in range(batches.rows):
        row = batches.row(epoch, number)
        for segment in range(1, row["segments"].max() + 1):
            part = {name: values[row["segments"] == segment] for name, values in row.items()}
            ids, types = part["input_ids"], part["token_type_ids"]
            assert (ids[0], ids[-1]) == (CLS, SEP)
            assert ids[types == 0][-1] == SEP and (ids == SEP).sum() == 2
            assert (part["position_ids"] == np.arange(len(ids))).all()
            assert (part["pair_labels"][1:] == IGNORED).all()
            assert part["pair_tokens"].tolist() == [len(ids)] + [0] * (len(ids) - 1)
            yield part["pair_labels"][0], ids[types == 0][1:-1], ids[types == 1][:-1]


def document_of(corpus, token):
    return np.searchsorted(corpus.ends, token - 5, side="right")


@pytest.mark.parametrize("kind", MODULES)
def test_half_of_the_pairs_are_changed_and_the_others_are_the_text_as_it_was(corpus, kind):
    pairs = [pair for epoch in range(4) for pair in pairs_of(batches_of(corpus, kind), epoch)]
    labels = np.asarray([label for label, _, _ in pairs])
    assert set(labels) <= {0, 1, IGNORED}
    judged = labels[labels != IGNORED]
    assert abs(judged.mean() - 0.5) < 4 * 0.5 / len(judged) ** 0.5
    for label, first, second in pairs:
        if label == 0:
            assert (np.diff(np.concatenate([first, second])) == 1).all()
        elif label == IGNORED:
            assert (len(first), len(second)) == (1, 0)


def test_a_changed_second_part_begins_a_sentence_of_another_document(corpus):
    beginnings = {5, *(corpus.ends + 5), *(corpus.sentences + 5)}
    changed = [(first, second) for label, first, second in pairs_of(batches_of(corpus, "nsp")) if label == 1]
    assert len(changed) > 50
    for first, second in changed:
        other = document_of(corpus, second)
        assert (other == other[0]).all() and other[0] != document_of(corpus, first[0])
        assert (np.diff(second) == 1).all() and second[0] in beginnings


def test_swapped_parts_are_the_same_text_and_are_cut_where_a_sentence_begins(corpus):
    sentences = set(corpus.sentences + 5)
    for label, first, second in pairs_of(batches_of(corpus, "sop")):
        if label == IGNORED:
            continue
        before, behind = (first, second) if label == 0 else (second, first)
        assert (np.diff(np.concatenate([before, behind])) == 1).all()
        inside = [token for token in range(before[0] + 1, behind[-1] + 1) if token in sentences]
        assert behind[0] in inside or not inside


@pytest.mark.parametrize("epoch", [0, 1])
def test_every_token_of_the_corpus_is_in_one_piece_of_an_epoch(corpus, epoch):
    found = [np.concatenate([first, second]) for _, first, second in pairs_of(batches_of(corpus, "sop"), epoch)]
    assert sorted(np.concatenate(found)) == list(corpus.tokens)


def test_pairs_are_a_function_of_seed_and_epoch(corpus):
    first, again, other = (batches_of(corpus, "nsp", seed).row(1, 3) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_without_a_second_document_no_part_is_from_elsewhere():
    alone = Corpus(np.arange(5, 65), np.asarray([60]), {}, np.arange(5, 60, 5))
    assert {int(label) for label, _, _ in pairs_of(batches_of(alone, "nsp"))} == {0}


def test_where_sentences_begin_is_noted_in_tokens(tmp_path):
    writer = CorpusWriter(tiny_tokenizer(tmp_path).backend_tokenizer, tmp_path / "train", sentences=True)
    texts = ["great film . bad plot ! the end", "film", "bad .\ngreat film"]
    for text in texts:
        writer.add(text)
    writer.close()
    corpus = Corpus.open(tmp_path / "train")
    assert corpus.ends.tolist() == [8, 9, 13]
    assert corpus.sentences.tolist() == [3, 6, 11]
    assert corpus.sentences_in(0, 8).tolist() == [3, 6]
    assert corpus.sentences_in(3, 6).tolist() == []


def model_of(kind):
    torch.manual_seed(0)
    shape = ScratchConfig(family=FAMILY[kind], layers=2, hidden=32, heads=4, positions=64)
    model = build_model(shape, "AutoModelForPreTraining", VOCABULARY, {"pad_token_id": PAD}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", MODULES)
def test_the_losses_of_packed_pairs_are_those_of_transformers_own_class(corpus, kind):
    objective = MODULES[kind].Objective(MODULES[kind].Config(mask=0.3), VOCABULARY, MASK, [0, 1, 2, 3, 4])
    batches = PackedBatches({"": [corpus]}, objective, Tokenizer, LENGTH, 8, 1)
    batch, model = batches.collate(0, np.arange(6)), model_of(kind)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    masked = weighted = pairs = right = predicted = 0.0
    with torch.no_grad():
        ours = objective.measure(model, tensors)
        for row in range(6):
            for segment in range(1, int(batch["segments"][row].max()) + 1):
                here = batch["segments"][row] == segment
                part = {name: value[row][here][None] for name, value in tensors.items() if name in objective.columns}
                output = model(input_ids=part["input_ids"], token_type_ids=part["token_type_ids"])
                chosen = part["labels"] != IGNORED
                masked += torch.nn.functional.cross_entropy(
                    output.prediction_logits[chosen], part["labels"][chosen], reduction="sum"
                ).item()
                predicted += int(chosen.sum())
                label = part["pair_labels"][:, 0]
                if label != IGNORED:
                    scores = output.seq_relationship_logits if kind == "nsp" else output.sop_logits
                    weighted += 0.3 * int(here.sum()) * torch.nn.functional.cross_entropy(scores, label).item()
                    right, pairs = right + int(scores.argmax(-1) == label), pairs + 1
    assert ours["masked_loss"][0].item() == pytest.approx(masked, rel=1e-4)
    assert ours["loss"][0].item() == pytest.approx(masked + weighted, rel=1e-4)
    assert (int(ours["loss"][1]), int(ours["pair_accuracy"][1])) == (predicted, pairs)
    assert ours["pair_accuracy"][0].item() == pytest.approx(100 * right)
