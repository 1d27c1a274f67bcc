"""Masked language modelling: frequencies, isolation of packed documents, parity with Hugging Face."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.models.attention import packed_mask
from engine.models.scratch import ScratchConfig, build_model
from engine.objectives._words import Words
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
    batch["predicted"] = torch.tensor([2, 4, 5])
    theirs = model(input_ids=ids, attention_mask=segments, labels=labels)
    total, count = objective(64).loss(model, batch)
    assert count == 3
    torch.testing.assert_close(total / count, theirs.loss, rtol=1e-6, atol=1e-6)


def test_a_new_model_predicts_every_token_as_often_as_the_corpus_has_it():
    model = tiny_masked_lm()
    tokens = np.repeat(np.arange(8), np.arange(8))
    predict_frequencies(model, tokens)
    bias = model.cls.predictions.bias
    expected = np.bincount(tokens, minlength=len(bias)) + 1.0
    np.testing.assert_allclose(bias.detach().exp().numpy(), expected / expected.sum(), rtol=1e-5)


def test_log_frequencies_are_not_rounded_under_autocast():
    shape = ScratchConfig(layers=1, hidden=32, heads=4, positions=16)
    model = build_model(shape, Objective.head, 64, {"pad_token_id": 0}).eval()
    Objective.adapt(model)
    predict_frequencies(model, np.repeat(np.arange(64), np.arange(64) ** 2))
    bias = model.cls.predictions.bias
    hidden = torch.zeros(3, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = model.cls.predictions.decoder(hidden)
    assert torch.equal(scores, bias.expand(3, -1))


WORDS = np.arange(1000) % 3 != 2
"""Every third id goes on with a word."""


def chosen_by(unit, tokens, mask=0.15, seed=1):
    words = SimpleNamespace(beginnings=lambda tokens: WORDS[tokens])
    found = Objective(Config(unit=unit, mask=mask), 1000, MASK, SPECIAL, words).corrupt(tokens, generator(seed, unit))
    return found["input_ids"], found["labels"], found["labels"] != IGNORED


def words_of(tokens):
    begins = WORDS[tokens] | np.isin(tokens, SPECIAL)
    begins[1:] |= np.isin(tokens, SPECIAL)[:-1]
    begins[0] = True
    return np.cumsum(begins) - 1


@pytest.mark.parametrize("mask", [0.15, 0.3])
@pytest.mark.parametrize("unit", ["word", "span"])
def test_whole_words_are_chosen_at_the_rate_that_is_asked_for(unit, mask):
    tokens = np.random.default_rng(0).integers(0, 1000, 400_000)
    _, labels, chosen = chosen_by(unit, tokens, mask)
    ordinary = ~np.isin(tokens, SPECIAL)
    assert chosen[ordinary].mean() == pytest.approx(mask, abs=0.005)
    assert not chosen[~ordinary].any()
    assert (labels[chosen] == tokens[chosen]).all()
    word = words_of(tokens)
    share = np.bincount(word, chosen) / np.bincount(word)
    assert set(share) <= {0.0, 1.0}, "all of a word, or nothing"


def test_spans_are_as_long_as_spanbert_has_them_and_share_one_fate():
    tokens = np.random.default_rng(0).permutation(np.resize(np.flatnonzero(WORDS)[5:], 600_000))  # every token is a word
    corrupted, _, chosen = chosen_by("span", tokens, mask=0.02)
    begins = np.flatnonzero(chosen & ~np.append(False, chosen[:-1]))
    lengths = np.asarray([int(np.argmin(chosen[at : at + 60])) for at in begins[:-1]])
    expected = np.minimum(np.random.default_rng(1).geometric(0.2, 10**6), 10)
    assert lengths.mean() == pytest.approx(expected.mean(), rel=0.06), "spans that touch count as one"
    assert (lengths == 1).mean() == pytest.approx(0.2, abs=0.02)
    masked = corrupted == MASK
    mixed = [at for at, length in zip(begins, lengths, strict=False) if 0 < masked[at : at + length].sum() < length]
    assert not mixed
    assert masked[chosen].mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_the_first_word_of_a_piece_is_chosen_as_often_as_any_other(unit):
    tokens = np.full(12, 6)
    counts = sum(chosen_by(unit, tokens, mask=0.3, seed=seed)[2].astype(int) for seed in range(4000)) / 4000
    assert counts == pytest.approx(np.full(12, 0.3), abs=0.03)


class Vocabulary:
    """What is asked of a tokenizer."""

    name_or_path = "theirs"

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[number] for number in ids]


@pytest.mark.parametrize(
    ("tokens", "begins"),
    [
        (["[PAD]", "play", "##ing", "the"], [True, True, False, True]),
        (["<s>", "Ġplay", "ing", "Ġthe"], [False, True, False, True]),
        (["<s>", "▁play", "ing", "▁the"], [False, True, False, True]),
    ],
)
def test_vocabularies_show_where_words_begin(tokens, begins):
    assert Words(Vocabulary(tokens), False).beginnings(np.arange(len(tokens))).tolist() == begins


def test_a_vocabulary_that_does_not_show_words_is_refused():
    with pytest.raises(UserError, match=r"theirs: its tokens do not show where words begin"):
        Words(Vocabulary(["a", "b"]), False)


LETTERS = ["[CLS]", "[SEP]", *"我来到北京清华大学的", "nlp", "##ers", "3", "，", "##学"]
PIECES = ["<s>", "</s>", "▁我", "来", "到北京", "清华", "大", "▁大", "学", "的", "▁nl", "p", "▁3", "，"]
FOUND = ["我", "来到", "北京", "清华大学"]


def words_found(tokens, text, segment=True):
    """The words of a text that is given as tokens."""
    vocabulary = Vocabulary(tokens)
    ids = np.asarray([tokens.index(token) for token in text])
    begins = Words(vocabulary, segment).beginnings(ids)
    places = np.append(np.flatnonzero(begins), len(text))
    return ["".join(text[first:end]) for first, end in itertools.pairwise(places)]


def test_chinese_words_are_those_of_jieba_and_other_words_those_of_the_vocabulary():
    pytest.importorskip("rjieba")
    text = ["[CLS]", *"我来到北京清华大学", "，", "nlp", "##ers", *"北京", "3", "的", "[SEP]"]
    assert words_found(LETTERS, text) == ["[CLS]", *FOUND, "，", "nlp##ers", "北京", "3", "的", "[SEP]"]
    assert words_found(LETTERS, text, segment=False) == [
        "[CLS]",
        *"我来到北京清华大学",
        "，",
        "nlp##ers",
        *"北京",
        "3",
        "的",
        "[SEP]",
    ]


def test_pieces_of_several_letters_begin_a_word_where_jieba_has_one():
    pytest.importorskip("rjieba")
    text = ["▁我", "来", "到北京", "清华", "大", "学", "▁nl", "p", "▁我", "，"]
    # A piece across the border of two words goes on with the first of them.
    assert words_found(PIECES, text) == ["▁我", "来到北京", "清华大学", "▁nlp", "▁我，"]
    # Behind a space a word begins, whatever jieba makes of the letters without it.
    assert words_found(PIECES, ["清华", "▁大", "学"]) == ["清华", "▁大学"]


def test_all_of_a_chinese_word_is_masked_or_nothing():
    pytest.importorskip("rjieba")
    vocabulary = Vocabulary([*LETTERS, "[MASK]"])
    ids = np.resize([vocabulary.tokens.index(letter) for letter in "我来到北京清华大学的"], 50_000)
    chosen = Objective(Config(unit="word", segmenter="jieba"), len(LETTERS), len(LETTERS), [0, 1], Words(vocabulary, True))
    hidden = chosen.corrupt(ids, generator(1))["labels"] != IGNORED
    assert hidden.mean() == pytest.approx(0.15, abs=0.015)
    borders = np.flatnonzero(Words(vocabulary, True).beginnings(ids))
    share = np.add.reduceat(hidden, borders) / np.diff(np.append(borders, len(ids)))
    assert set(share) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("tokens", "text", "segment", "remark"),
    [
        (LETTERS, "我来到北京" * 9, False, "100% of the tokens are Chinese letters, each a word to this vocabulary"),
        (LETTERS, "我来到北京" * 9, True, None),
        (LETTERS, ["nlp", "##ers", "3"] * 9, False, None),
        (
            PIECES,
            ["▁我", *["来", "大", "学"] * 9],
            False,
            "100% of the tokens lie in words of more than 20 tokens: a text without",
        ),
        (PIECES, ["▁nl", "p"] * 9, False, None),
    ],
)
def test_a_text_whose_words_the_vocabulary_does_not_show_is_remarked(tokens, text, segment, remark):
    pytest.importorskip("rjieba")
    found = Words(Vocabulary(tokens), segment).remarks(np.asarray([tokens.index(token) for token in text]))
    assert found == [] if remark is None else remark in found[0]


def test_bytes_have_no_chinese_letters():
    with pytest.raises(UserError, match=r"theirs: its tokens are bytes, not Chinese letters: leave out objective.segmenter"):
        Words(Vocabulary(["Ġthe", "æĪĳ"]), True)


def test_a_segmenter_needs_words_and_its_package(monkeypatch):
    with pytest.raises(ValueError, match="tokens are chosen one by one: say unit: word"):
        Config(segmenter="jieba")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bothways\[chinese\]'"):
        Config(segmenter="jieba", unit="word")
