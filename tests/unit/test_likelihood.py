"""Pretrained language models judged on texts and minimal pairs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from engine.errors import UserError
from engine.likelihood import LanguageModel
from launch.evaluate import evaluate
from tests.families import config_of, tokenizer_of
from tests.recipes import ragged_rows, write_model, write_rows
from tests.unit.models import tiny_masked_lm, tiny_tokenizer

TEXTS = [row["text"] for row in ragged_rows(12)]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    path = tmp_path_factory.mktemp("masked")
    tiny_masked_lm(initializer_range=0.3).save_pretrained(path)
    tiny_tokenizer(path).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    path = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=2, eos_token_id=3)).save_pretrained(path)
    tiny_tokenizer(path).save_pretrained(path)
    return path


def plain(path, kind, text):
    """The log-likelihood by transformers alone, one text and one token at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    model = (AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM).from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    total = 0.0
    for place in range(1, ids.shape[1] - 1):
        given, at = (ids.clone(), place) if kind == "masked" else (ids[:, :place], place - 1)
        if kind == "masked":
            given[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            total += model(input_ids=given).logits[0, at].double().log_softmax(-1)[ids[0, place]].item()
    return total


def by_permutation(path, text):
    """The pseudo-log-likelihood of a model with two streams by transformers alone, one token at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    given = tokenizer(text, return_tensors="pt")
    ids, total = given["input_ids"], 0.0
    for place in range(len(tokenizer(text, add_special_tokens=False)["input_ids"])):
        hidden, target = torch.zeros(1, ids.shape[1], ids.shape[1]), torch.zeros(1, 1, ids.shape[1])
        hidden[:, :, place] = target[0, 0, place] = 1
        with torch.no_grad():
            scores = model(ids, token_type_ids=given["token_type_ids"], perm_mask=hidden, target_mapping=target).logits[0, 0]
        total += scores.double().log_softmax(-1)[ids[0, place]].item()
    return total


def scored(path, texts, **options):
    model = LanguageModel(path, 40)
    return model.log_likelihoods(model.encode(texts), **options)


def judge(model, *data, settings=(), **options):
    given = {"max_length": None, "engine": None, "threads": 1, **options}
    return evaluate(model, [str(path) for path in data], list(settings), **given)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_log_likelihoods_are_those_of_a_plain_loop_over_each_text_alone(kind, request):
    path = request.getfixturevalue(kind)
    assert scored(path, TEXTS) == pytest.approx([plain(path, kind, text) for text in TEXTS], rel=1e-5)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_neither_padding_nor_the_size_of_a_batch_nor_an_unknown_head_changes_them(kind, request, monkeypatch):
    path = request.getfixturevalue(kind)
    alone = np.array([scored(path, [text])[0] for text in TEXTS])
    for size in (1, 40, 100_000):
        assert scored(path, TEXTS, batch_tokens=size) == pytest.approx(alone, rel=1e-5)
    model = LanguageModel(path, 64)
    model.known_head = False
    assert model.log_likelihoods(model.encode(TEXTS)) == pytest.approx(alone, rel=1e-5)


def test_a_model_with_two_streams_predicts_each_token_from_all_others(tmp_path):
    tokenizer = tokenizer_of("xlnet")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of("xlnet", tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert scored(tmp_path, TEXTS) == pytest.approx([by_permutation(tmp_path, text) for text in TEXTS], rel=1e-5)


def test_where_a_tokenizer_puts_nothing_before_a_text_a_document_begins(tmp_path):
    tokenizer = tokenizer_of("gpt2")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("gpt2", tokenizer)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("the film was good")["input_ids"]]])
    with torch.no_grad():
        given = model(ids).logits[0, :-1].double().log_softmax(-1)
    expected = given.gather(1, ids[0, 1:, None]).sum().item()
    assert scored(tmp_path, ["the film was good"])[0] == pytest.approx(expected, rel=1e-5)


def test_all_work_is_told_to_the_progress_bar(masked):
    model, told = LanguageModel(masked, 64), []
    texts = model.encode(TEXTS)
    model.log_likelihoods(texts, told.append)
    assert sum(told) == model.work(texts)


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_a_model_that_prefers_the_good_sentences_is_always_right_and_never_when_they_are_swapped(kind, request, tmp_path):
    path = request.getfixturevalue(kind)
    scores = dict(zip(TEXTS, scored(path, TEXTS), strict=True))
    pairs = [sorted(pair, key=scores.get) for pair in zip(TEXTS[::2], TEXTS[1::2], strict=True)]
    rows = write_rows(tmp_path / "rows.jsonl", [{"good": good, "bad": bad, "set": "a"} for bad, good in pairs])
    report, records = judge(path, rows)
    assert report["metrics"]["accuracy"]["value"] == 100
    assert records[0]["good"]["log_likelihood"] == pytest.approx(scores[pairs[0][1]])
    swapped, _ = judge(path, rows, settings=["good=bad", "bad=good"], slices=["set"])
    assert swapped["metrics"]["accuracy"]["value"] == 0
    assert swapped["metrics"]["accuracy"]["high"] > 0
    same, _ = judge(path, rows, settings=["good=good", "bad=good"])
    assert same["metrics"]["accuracy"]["value"] == 0
    assert "6 pairs with equal sums count as wrong" in same["remarks"]


@pytest.mark.parametrize(("kind", "pseudo"), [("masked", "pseudo_"), ("causal", "")])
def test_perplexity_and_bits_per_byte_are_of_all_tokens_and_bytes(kind, pseudo, request, tmp_path):
    path = request.getfixturevalue(kind)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    report, records = judge(path, rows, slices=["length"])
    total, words = scored(path, TEXTS).sum(), sum(len(text.split()) for text in TEXTS)
    found = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert found == pytest.approx(
        {
            f"{pseudo}log_likelihood": total / words,
            f"{pseudo}perplexity": math.exp(-total / words),
            f"{pseudo}bits_per_byte": -total / math.log(2) / sum(map(len, TEXTS)),
            f"{pseudo}bits_per_character": -total / math.log(2) / sum(map(len, TEXTS)),
        }
    )
    assert all(metric["low"] < metric["value"] < metric["high"] for metric in report["metrics"].values())
    assert sum(group["rows"] for group in report["slices"]["length"]["groups"]) == len(records) == len(TEXTS)


def test_what_is_cut_off_or_unknown_is_said_and_bytes_are_those_that_were_scored(masked, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the film was xyzzy good and warm"}, {"text": "a plot"}])
    report, records = judge(masked, rows, max_length=7)
    assert "1 of 7 tokens are unknown" in report["remarks"]
    assert any("1 of 2 texts are truncated to 7 tokens" in line for line in report["remarks"])
    assert records[0]["bytes"] == len("the film was xyzzy good")
    assert records[0]["log_likelihood"] == pytest.approx(scored(masked, ["the film was xyzzy good"])[0], rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"good": "a"}], [], "rows.jsonl:1: no column 'bad' in this row"),
        ([{"txt": "a"}], [], "rows.jsonl:1: no column 'text' in this row: did you mean 'txt'"),
        ([{"text": "a"}, {"text": ""}], [], "rows.jsonl:2: column 'text' is empty"),
        ([{"text": "a"}, {"text": "\x01"}], [], "rows.jsonl:2: the tokenizer makes no token"),
        ([{"text": "a"}], ["--set", "label=b"], "--set: unknown key 'label'"),
        ([{"text": "a"}], ["--set", "text=text", "--set", "bad=text"], "rows hold texts or pairs"),
        ([{"text": "a"}], ["--slice", "sort"], "rows.jsonl:1: no column 'sort' to slice by"),
        ([{"text": "a"}], ["--max-length", "65"], "max_length=65 is above the 64 positions"),
        ([{"text": "a"}], ["--engine", "onnxruntime"], "only bundles hold engines"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_2(masked, tmp_path, call, rows, options, message):
    status, _, err = call("evaluate", masked, write_rows(tmp_path / "rows.jsonl", rows), *options)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


def test_the_command_prints_a_table_or_json_and_writes_every_row(causal, tmp_path, call):
    rows = write_rows(tmp_path / "rows.jsonl", [{"good": a, "bad": b, "set": "x"} for a, b in itertools.pairwise(TEXTS)])
    status, out, _ = call("evaluate", causal, rows, "--slice", "set", "--output", tmp_path / "out.jsonl")
    assert status == 0
    assert "accuracy by set" in out
    assert "the sum over the tokens" in out
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 11
    assert json.loads(call("evaluate", causal, rows, "--json")[1])["rows"] == 11


def test_models_without_such_a_likelihood_are_refused_and_those_with_a_task_go_the_old_way(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ragged_rows(12))
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="writes a text from another one"):
        judge(tmp_path / "t5", rows)
    classifier = write_model(tmp_path / "classifier")
    with pytest.raises(UserError, match=r"config\.json names no language model"):
        judge(classifier, rows)
    assert "f1_macro" in judge(classifier, rows, settings=["type=classification"])[0]["metrics"]


def test_a_discriminator_is_no_language_model(tmp_path):
    shape = {"hidden_size": 32, "embedding_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    ElectraForPreTraining(ElectraConfig(**shape)).save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    with pytest.raises(UserError, match=r"weights are missing .* its files are not those of a ElectraForMaskedLM"):
        judge(tmp_path / "model", tmp_path / "rows.jsonl")
