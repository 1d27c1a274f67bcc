"""A corpus as a stage of its own: tokenized once, learnt from by any number of pretrainings, several of them mixed."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from engine.config import load_recipe
from engine.data.shards import Shards
from engine.errors import UserError
from launch.check import check_recipe
from launch.planning.subject import subject_of
from launch.recipe import load_stages
from tests.recipes import (
    corpus_section,
    pretrain_section,
    ragged_rows,
    read_history,
    read_weights,
    run_here,
    train_section,
    write_model,
    write_recipe,
    write_rows,
)
from tests.unit.models import WORDS


def on_corpus(corpus="text", **changes):
    section = pretrain_section(corpus=corpus, **changes)
    return {"pretrain": {key: value for key, value in section.items() if key not in ("data", "tokenizer")}}


def check(path):
    recipe = load_recipe(path)
    return check_recipe(recipe, load_stages(recipe))


def test_a_pretraining_on_a_corpus_has_the_bits_of_one_on_its_texts(tmp_path):
    stages = {"text": {"corpus": corpus_section()}, "base": on_corpus(), "direct": {"pretrain": pretrain_section()}}
    recipe = write_recipe(tmp_path, stages)
    text, base, direct = (run_here(recipe, name, tmp_path / "runs").directory for name in stages)
    ours, theirs = read_weights(base), read_weights(direct)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert read_history(base) == read_history(direct)
    records = [json.loads((directory / "stage.json").read_text()) for directory in (text, base, direct)]
    told = {split: {key: value for key, value in each.items() if key != "shards"} for split, each in records[0]["corpus"].items()}
    assert told == records[1]["corpus"] == records[2]["corpus"]
    assert records[0]["corpus"]["train"]["shards"] == 1
    assert records[1]["inputs"]["corpus[0].corpus"]["reference"] == "text"
    assert "corpus/train-00000-00000/train/tokens.bin" in records[0]["files"]
    assert AutoTokenizer.from_pretrained(base).get_vocab() == AutoTokenizer.from_pretrained(text).get_vocab()


def test_many_shards_and_a_vocabulary_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.corpus.CHUNK", 8)
    write_rows(tmp_path / "rows.jsonl", [{"text": " ".join([word] * count)} for word in WORDS for count in range(5, 25)])
    learnt = {"train": {"vocab_size": 200}}
    stages = {
        "text": {"corpus": corpus_section(tokenizer=learnt, shard_tokens=400, objective={"type": "nsp"})},
        "base": on_corpus(train=train_section(steps=60, learning_rate=1e-2, evaluate_every=30)),
    }
    recipe = write_recipe(tmp_path, stages)
    assert subject_of(load_stages(load_recipe(recipe))[1], "eager").build().config.vocab_size == 256
    check(recipe)
    text, base = (run_here(recipe, name, tmp_path / "runs").directory for name in stages)
    shards = Shards(text / "corpus", "train")
    assert len(shards) > 5 and shards.with_sentences
    losses = [record["validation"]["loss"] for record in read_history(base) if "validation" in record]
    assert losses[-1] < losses[0] - 0.1
    stage = run_here(recipe, "text", tmp_path / "again")
    again = json.loads((stage.directory / "stage.json").read_text())
    assert again["files"] == json.loads((text / "stage.json").read_text())["files"]


def test_several_corpora_are_mixed_and_judged_apart(tmp_path, capsys):
    write_rows(tmp_path / "more.jsonl", ragged_rows(400, seed=7))
    more = {"train": "more.jsonl", "validation": "10%"}
    mixed = [{"corpus": "text", "weight": 3}, {"corpus": "more", "weight": 1}]
    stages = {
        "text": {"corpus": corpus_section()},
        "more": {"corpus": corpus_section(data=more)},
        "base": on_corpus(mixed),
        "alike": on_corpus(["text", "more"], mixing=0.0),
    }
    recipe = write_recipe(tmp_path, stages)
    check(recipe)
    *_, base, alike = (run_here(recipe, name, tmp_path / "runs").directory for name in stages)
    said = capsys.readouterr().out
    assert "text: 75.00% of the rows" in said and "more: 50.00% of the rows" in said
    record = json.loads((base / "stage.json").read_text())
    found = record["metrics"]["validation"]
    assert min(found["loss_text"], found["loss_more"]) < found["loss"] < max(found["loss_text"], found["loss_more"])
    ledgers = [json.loads((tmp_path / f"runs/tiny/{name}/stage.json").read_text())["corpus"] for name in ("text", "more")]
    assert record["corpus"]["train"]["tokens"] == sum(ledger["train"]["tokens"] for ledger in ledgers)
    assert read_history(base)[1:] != read_history(alike)[1:]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"train": "rows.jsonl"}}, "give exactly one of data, the texts, and corpus"),
        ({"corpus": None}, "give exactly one of data, the texts, and corpus"),
        ({"tokenizer": "model"}, "tokenizer: a corpus has its own: say it in the stage that makes the corpus"),
        ({"text": "body"}, "text: a corpus is made already: say it in the stage that makes the corpus"),
        ({"corpus": "base"}, "a stage cannot read itself"),
        ({"corpus": "other"}, "'other' is no stage of this recipe"),
        ({"corpus": "other0"}, "stage 'other0' (pretrain) gives a pretrained model; a corpus is needed"),
        ({"corpus": ["text", "other0"]}, "stage 'other0' (pretrain) gives a pretrained model; a corpus is needed"),
        ({"corpus": ["text", {"corpus": "other0", "weight": 2}]}, "corpus: give a weight for each, or for none"),
        ({"corpus": ["text", "text"]}, "corpus: 'text' is named twice"),
        ({"corpus": [{"corpus": "text", "weight": 0}]}, "corpus.0.weight: input should be greater than 0"),
        ({"corpus": []}, "give exactly one of data, the texts, and corpus"),
        ({"mixing": 0.3}, "mixing weighs several corpora by their sizes"),
    ],
)
def test_what_contradicts_a_corpus_is_one_line(tmp_path, section, message):
    base = on_corpus()["pretrain"] | section
    stages = {"text": {"corpus": corpus_section()}, "other0": {"pretrain": pretrain_section()}, "base": {"pretrain": base}}
    with pytest.raises(UserError) as error:
        check(write_recipe(tmp_path, stages))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"train": "rows.jsonl", "validation": None}}, "data.validation is needed to measure the loss"),
        ({"data": {"train": "rows.jsonl", "slices": ["text"]}}, "data.slices: pretraining judges no single rows"),
        ({"tokenizer": {"model": "model", "train": {}}}, "tokenizer needs exactly one of model and train"),
        ({"tokenizer": {"train": {}}, "objective": {"type": "clm"}}, "wordpiece has no eos_token, which next-token prediction"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"text": "body"}, "no column 'body'"),
        ({"tokenizer": "nowhere"}, "'nowhere' is no stage of this recipe"),
    ],
)
def test_a_corpus_that_cannot_be_made_is_one_line(tmp_path, section, message):
    with pytest.raises(UserError) as error:
        check(write_recipe(tmp_path, {"text": {"corpus": corpus_section(**section)}}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_corpus_lacks_is_told_before_anything_is_learnt(tmp_path):
    write_model(tmp_path / "other", vocab_size=40)
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "model"))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "other")
    stages = {
        "text": {"corpus": corpus_section()},
        "more": {"corpus": corpus_section(tokenizer="other")},
        "pairs": on_corpus(objective={"type": "nsp"}),
        "mixed": on_corpus(["text", "more"]),
        "on": on_corpus(model="other"),
    }
    recipe = write_recipe(tmp_path, stages)
    for name in ("text", "more"):
        run_here(recipe, name, tmp_path / "runs")
    for name, message in {
        "pairs": "corpus 'text' lacks the beginnings of sentences, which masked language modelling with next sentences needs",
        "mixed": "corpus 'text' was tokenized by another vocabulary than that of 'more'",
        "on": "corpus 'text' was tokenized by another vocabulary than that of 'other'",
    }.items():
        with pytest.raises(UserError, match=message):
            run_here(recipe, name, tmp_path / "runs")


def test_a_directory_of_an_earlier_run_is_a_corpus_and_another_one_is_not(tmp_path):
    recipe = write_recipe(tmp_path, {"text": {"corpus": corpus_section()}})
    directory = run_here(recipe, "text", tmp_path / "runs").directory
    run_here(write_recipe(tmp_path, {"base": on_corpus(str(directory))}, "second"), "base", tmp_path / "runs")
    with pytest.raises(UserError, match=r"model: no corpus \(no corpus/corpus.json\): a corpus stage makes one"):
        check(write_recipe(tmp_path, {"base": on_corpus("model")}))


def test_several_languages_are_mixed_each_with_its_tag(tmp_path):
    write_rows(tmp_path / "de.jsonl", ragged_rows(200, seed=7))
    data = {"train": ["rows.jsonl", "de.jsonl"], "validation": "25%"}
    learnt = {"train": {"type": "bpe", "vocab_size": 300, "special_tokens": ["en_XX", "de_DE"]}}
    kind = {"type": "denoising"}
    stages = {
        "en": {"corpus": corpus_section(tokenizer=learnt, data=data, objective=kind, language="en_XX")},
        "de": {"corpus": corpus_section(tokenizer="en", data={**data, "train": "de.jsonl"}, objective=kind, language="de_DE")},
        "base": on_corpus(["en", "de"], objective=kind, model={**pretrain_section()["model"], "family": "mbart"}),
    }
    recipe = write_recipe(tmp_path, stages)
    check(recipe)
    *_, base = (run_here(recipe, name, tmp_path / "runs").directory for name in stages)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert {"en_XX", "de_DE"} <= set(tokenizer.all_special_tokens)
    assert json.loads((base / "stage.json").read_text())["metrics"]["validation"]["loss_de"] > 0
    with pytest.raises(UserError, match=r"language: de_XX is no special token of .*: did you mean '.._..'"):
        run_here(recipe, "de", tmp_path / "again", "de.language=de_XX", f"de.tokenizer={base}")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"type": "bpe"}, "language: the vocabulary has no en_XX: name it in tokenizer.train.special_tokens"),
        ({"special_tokens": ["en_XX"]}, "special_tokens: wordpiece takes none: set type: bpe"),
        ({"type": "bpe", "special_tokens": ["en_XX", "en_XX"]}, "special_tokens: 'en_XX' is there twice: leave one out"),
    ],
)
def test_a_language_without_its_token_is_one_line(tmp_path, train, message):
    for stage in (
        {"corpus": corpus_section(tokenizer={"train": train}, language="en_XX")},
        {"pretrain": pretrain_section(tokenizer={"train": train}, language="en_XX")},
    ):
        with pytest.raises(UserError) as error:
            check(write_recipe(tmp_path, {"text": stage}))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_killed_while_it_is_published_a_corpus_is_not_made_again(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, {"text": {"corpus": corpus_section()}})

    def killed(self, **facts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("engine.stages.stage.Stage.complete", killed)
        run_here(recipe, "text", tmp_path / "runs")
    (tokens,) = (tmp_path / "runs/tiny/text.partial/corpus").glob("*/train/tokens.bin")
    before = tokens.stat().st_mtime_ns
    directory = run_here(recipe, "text", tmp_path / "runs").directory
    (published,) = (directory / "corpus").glob("*/train/tokens.bin")
    assert published.stat().st_mtime_ns == before
