"""Span corruption and denoising: lengths, what is hidden, packing of two sides, parity with Hugging Face."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.corpus import Corpus
from engine.data.packed import PackedBatches
from engine.data.vocabulary import learn_tokenizer
from engine.errors import UserError
from engine.models import load_model, load_tokenizer
from engine.models.scratch import ScratchConfig, build_model, special_ids
from engine.objectives import Piece, denoising, span_corruption
from engine.objectives._tokens import IGNORED
from engine.randomness import generator

WORDS = ["the", "cat", "sat", "on", "mats", "and", "dogs", "ran", "over", "long", "green", "hills", "birds", "sang", "songs"]
LENGTH = 48
CASES = [("t5", span_corruption), ("mt5", span_corruption), ("bart", denoising), ("mbart", denoising), ("t5", denoising)]
EACH = pytest.mark.parametrize(("family", "module"), CASES)


def texts():
    rng = np.random.default_rng(0)
    return iter([" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(80)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "made"
    learn_tokenizer("bpe", texts, 400, False, directory, span_corruption.Objective.added_tokens)
    return load_tokenizer(directory)


def objective_of(module, tokenizer, **keys):
    return module.Objective.of_tokenizer(module.Config(**keys), tokenizer)


def batches_of(objective, tokenizer, length=LENGTH):
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    ends = np.cumsum([len(part) for part in ids])
    sentences = np.asarray([end + 3 for end in ends[:-1] if end + 3 not in set(ends.tolist())])
    corpus = Corpus(np.concatenate(ids), ends, sentences=sentences)
    return PackedBatches({"": [corpus]}, objective, tokenizer, length, 8, 1)


def test_a_learnt_vocabulary_is_the_same_again_and_gives_the_text_back(tokenizer, tmp_path):
    learn_tokenizer("bpe", texts, 400, False, tmp_path / "again", span_corruption.Objective.added_tokens)
    assert load_tokenizer(tmp_path / "again").get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) <= 400
    text = "the dogs sang on green hills"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("x <extra_id_7>")["input_ids"][-2] == tokenizer.get_vocab()["<extra_id_7>"]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.floats(0.05, 0.9), st.floats(1, 12), st.integers(0, 10**6))
def test_spans_give_the_text_back_and_lengths_are_exact(length, mask, mean_span, seed):
    config = span_corruption.Config(mask=mask, mean_span=mean_span)
    sentinels = list(range(1000, 1100))
    objective = span_corruption.Objective(config, sentinels, (1, 1), 2)
    tokens = np.concatenate([[1], np.arange(10_000, 10_000 + length), [2]])
    made = objective.corrupt(tokens, generator(seed))
    hidden, spans = span_corruption.parts(np.asarray(length), config)
    source, target = made["input_ids"], made["labels"]
    assert len(source) == objective.row_lengths(np.asarray([length + 2]))[0] == length + 2 - hidden + spans
    assert len(target) == hidden + spans + 1 and target[-1] == 2
    assert (made["decoder_input_ids"][1:] == target[:-1]).all()
    written, at = {}, None
    for token in target[:-1]:
        if token in sentinels:
            at = written.setdefault(int(token), [])
        else:
            at.append(int(token))
    assert list(written) == sentinels[:spans] and all(written.values())
    back = [one for token in source for one in written.get(int(token), [int(token)])]
    assert back == tokens.tolist()


def test_spans_have_the_share_and_the_mean_of_the_paper():
    hidden, spans = span_corruption.parts(np.asarray(512), span_corruption.Config())
    assert hidden == 77 and spans == 26 and hidden / spans == pytest.approx(3, abs=0.05)
    objective = span_corruption.Objective(span_corruption.Config(), list(range(1000, 1100)), (0, 1), 2)
    # T5's own arithmetic: 568 tokens leave 512 for the encoder, its end among them, and 114 for the decoder.
    assert objective.row_lengths(np.asarray([568 + 1]))[0] == 512
    assert span_corruption.Objective.sides(span_corruption.Config(), 512) == (512, 114)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 0.95), st.floats(1, 10), st.integers(0, 10**6))
def test_infilling_hides_the_share_keeps_the_order_and_never_grows(length, mask, mean_span, seed):
    objective = denoising.Objective(denoising.Config(mask=mask, mean_span=mean_span), 4, (0, 0))
    text = np.arange(100, 100 + length)
    found = objective.infilled(text, generator(seed))
    kept = found[found != 4]
    assert len(found) <= length and (np.diff(kept) > 0).all()
    assert length - len(kept) in (int(length * mask), int(length * mask) + 1)


def test_the_share_that_is_hidden_is_met_on_average_also_of_short_texts():
    objective = denoising.Objective(denoising.Config(permute_sentences=False), 4, (0, 0))
    hidden = [7 - int((objective.infilled(np.arange(100, 107), generator(seed)) != 4).sum()) for seed in range(600)]
    assert np.mean(hidden) == pytest.approx(0.3 * 7, rel=0.03)


def test_a_decoder_whose_configuration_names_no_first_token_begins_with_padding(tokenizer):
    objective, model = objective_of(span_corruption, tokenizer), model_of("t5", tokenizer)
    batch = batches_of(objective, tokenizer).collate(0, np.arange(2))
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    with torch.no_grad():
        named = objective.loss(model, tensors)[0]
        model.config.decoder_start_token_id = None
        assert objective.loss(model, tensors)[0] == named


def test_infilled_spans_have_the_mean_of_their_poisson_distribution():
    objective = denoising.Objective(denoising.Config(), 4, (0, 0))
    lengths, inserted, masks = [], 0, 0
    for seed in range(60):
        found = objective.infilled(np.arange(100, 1100), generator(seed))
        last, masked = 99, 0
        for token in [*found, 1100]:
            if token == 4:
                masked += 1
                continue
            gap = int(token) - last - 1
            if gap and masked == 1:
                lengths.append(gap)
            inserted += masked - (1 if gap else 0) if masked else 0
            masks += masked
            last, masked = int(token), 0
    # Of the spans that hold a token; of all that were drawn, 5 % hold none.
    assert np.mean(lengths) == pytest.approx(3 / (1 - np.exp(-3)), rel=0.05)
    assert inserted / masks == pytest.approx(np.exp(-3), abs=0.02)


def test_sentences_are_permuted_for_the_encoder_alone():
    objective = denoising.Objective(denoising.Config(mask=1e-9), 4, (1, 1))
    tokens = np.arange(100, 112)
    piece = Piece([1], tokens, [2], [], np.asarray([4, 8]), lambda *_: None)
    found = {tuple(objective.make(piece, generator(seed))["input_ids"]) for seed in range(60)}
    parts = [tuple(range(100 + 4 * part, 104 + 4 * part)) for part in range(3)]
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert found == {(1, *(one for part in order for one in parts[part]), 2) for order in orders}
    assert objective.make(piece, generator(0))["labels"].tolist() == [1, *tokens, 2]


@EACH
def test_every_token_is_in_one_row_of_an_epoch(tokenizer, family, module):
    batches = batches_of(objective_of(module, tokenizer), tokenizer)
    back = []
    for number in range(batches.rows):
        row = batches.row(1, number)
        assert row["segments"].shape == (LENGTH,)
        assert (np.diff(np.unique(row["beside_segments"])) == 1).all()
        assert row["beside_segments"].max() == row["segments"].max()
        special = set(tokenizer.all_special_ids) | {IGNORED}
        names = ("input_ids", "labels") if module is span_corruption else ("labels",)
        back += [int(token) for name in names for token in row[name] if int(token) not in special]
    assert sorted(back) == sorted(batches.sources[""][0].tokens.tolist())


def model_of(family, tokenizer):
    torch.manual_seed(0)
    shape = ScratchConfig(family=family, layers=2, hidden=32, heads=4, positions=64)
    model = build_model(shape, "AutoModelForSeq2SeqLM", len(tokenizer), special_ids(tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.add_(torch.randn_like(buffer))
    return model


@EACH
def test_the_loss_of_packed_rows_is_that_of_transformers_own_class_on_each_document_alone(tokenizer, family, module, tmp_path):
    objective = objective_of(module, tokenizer)
    batches, model = batches_of(objective, tokenizer), model_of(family, tokenizer)
    model.save_pretrained(tmp_path)
    batch = batches.collate(0, np.arange(5))
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    encoder, decoder = objective.prefixes()
    plain = load_model(tmp_path, "AutoModelForSeq2SeqLM").eval()
    total = count = 0
    with torch.no_grad():
        ours, predicted = objective.loss(model, tensors)
        for row in range(5):
            for segment in range(1, int(batch["segments"][row].max()) + 1):
                source = batch["input_ids"][row][batch[f"{encoder}segments"][row] == segment]
                labels = batch["labels"][row][batch[f"{decoder}segments"][row] == segment]
                output = plain(input_ids=source[None], labels=labels[None])
                total, count = total + len(labels) * output.loss.item(), count + len(labels)
    assert int(predicted) == count == batch["count"]
    assert ours.item() == pytest.approx(total, rel=1e-5)


@EACH
def test_gradients_reach_every_weight(tokenizer, family, module):
    objective, model = objective_of(module, tokenizer), model_of(family, tokenizer).train()
    batch = batches_of(objective, tokenizer).collate(0, np.arange(8))
    objective.loss(model, {name: value for name, value in batch.items() if torch.is_tensor(value)})[0].backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@EACH
def test_a_new_model_has_the_size_that_was_asked_for_and_knows_where_a_decoder_begins(tokenizer, family, module):
    model = model_of(family, tokenizer)
    config = model.config
    assert len(list(model.get_decoder().parameters())) and sum("decoder" in name for name, _ in model.named_parameters())
    start = {"t5": tokenizer.pad_token_id, "mt5": tokenizer.pad_token_id, "bart": tokenizer.eos_token_id, "mbart": None}[family]
    assert getattr(config, "decoder_start_token_id", None) == start
    assert getattr(config, "forced_eos_token_id", None) in (None, tokenizer.eos_token_id)
    sizes = [matrix.shape for name, matrix in model.named_parameters() if "fc1.weight" in name or "wi" in name]
    assert len(sizes) >= 4 and {size[0] for size in sizes} == {128}


def test_a_tokenizer_without_sentinels_is_refused(tmp_path):
    learn_tokenizer("bpe", texts, 300, False, tmp_path / "made")
    with pytest.raises(UserError, match="has no <extra_id_0>, which span corruption needs"):
        span_corruption.Objective.require(load_tokenizer(tmp_path / "made"))
    denoising.Objective.require(load_tokenizer(tmp_path / "made"))


def test_what_is_made_up_for_a_plan_is_as_large_as_a_row(tokenizer):
    for family, module in CASES:
        loss = module.Objective.made_up_loss(module.Config(), model_of(family, tokenizer), 2, LENGTH)
        assert torch.isfinite(loss)


class Tagging:
    """A tokenizer that knows where it puts a language, as mBART's does."""

    def __init__(self, tokenizer):
        self.tokenizer, self.src_lang = tokenizer, "en"

    def __call__(self, text, add_special_tokens=True, return_token_type_ids=False):
        tags = [2, {"en": 90, "de": 91}[self.src_lang]] if add_special_tokens else []
        return {"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"] + tags}


def test_a_text_is_tagged_with_its_language_where_its_tokenizer_puts_it(tokenizer):
    frame = denoising.Objective.frame
    own, tag = frame(tokenizer), tokenizer.convert_tokens_to_ids("<extra_id_7>")
    assert frame(tokenizer, "<extra_id_7>") == own._replace(after=(*own.after, tag))
    knows = Tagging(tokenizer)
    assert frame(knows, "de").after == (2, 91) and frame(knows).after == (2, 90) and knows.src_lang == "en"
    assert span_corruption.Objective.frame(tokenizer, "<extra_id_7>") == own


def test_every_document_of_a_mixture_has_the_tag_of_its_corpus_and_mbart_begins_with_it(tokenizer):
    objective = objective_of(denoising, tokenizer)
    tags = {"en": "<extra_id_7>", "de": "<extra_id_8>"}
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]
    halves = {"en": ids[:40], "de": ids[40:]}
    sources = {name: [Corpus(np.concatenate(part), np.cumsum([len(each) for each in part]))] for name, part in halves.items()}
    batches = PackedBatches(sources, objective, tokenizer, LENGTH, 8, 1, languages=tags)
    first = dict(zip(sources, batches.order.streams, strict=True))
    for name, stream in first.items():
        tag, back = tokenizer.convert_tokens_to_ids(tags[name]), []
        for number in range(stream.first, stream.first + stream.total):
            row = batches.row(1, number)
            for segment in range(1, row["segments"].max() + 1):
                here, beside = row["segments"] == segment, row["beside_segments"] == segment
                assert row["labels"][here][-2:].tolist() == [tokenizer.eos_token_id, tag]
                assert row["decoder_input_ids"][here][0] == tag
                assert row["input_ids"][beside][-2:].tolist() == [tokenizer.eos_token_id, tag]
                back += row["labels"][here][1:-2].tolist()
        assert sorted(back) == sorted(np.concatenate(halves[name]).tolist())
    model, losses = model_of("mbart", tokenizer), []
    for languages in (tags, {name: "<extra_id_9>" for name in tags}):
        batch = PackedBatches(sources, objective, tokenizer, LENGTH, 8, 1, languages=languages).collate(0, np.arange(2))
        with torch.no_grad():
            losses.append(float(objective.loss(model, {k: v for k, v in batch.items() if torch.is_tensor(v)})[0]))
    assert losses[0] != losses[1]
