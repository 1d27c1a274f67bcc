"""Words for a vocabulary that is there: which ones, what they save, where their rows begin, a model that goes on with them."""

import shutil

import pytest
import torch

from engine.config import load_recipe
from engine.data.vocabulary import extend_tokenizer, learn_tokenizer
from engine.errors import UserError
from engine.models import load_tokenizer
from engine.models.fitting import fit_new_words, fit_tokenizer
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import pretrain_section, ragged_rows, read_weights, run_here, train_section, write_recipe, write_rows
from tests.unit.models import tiny_masked_lm

KNOWN = ["the plot was good and the film was long"] * 4 + ["abcdefghijklmnopqrstuvwxyz"]
DOMAIN = ["The lessee signed the lease; LESSEE lessee"] * 3 + ["a tort, the tort of the lessee", "the film"]


@pytest.fixture
def own(tmp_path):
    learn_tokenizer("wordpiece", lambda: iter(KNOWN), 90, True, tmp_path / "own")
    return load_tokenizer(tmp_path / "own")


def extended(own, tmp_path, words):
    note = extend_tokenizer(own, lambda: iter(DOMAIN), words, tmp_path / "more")
    return note, load_tokenizer(tmp_path / "more")


def length(tokenizer):
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in DOMAIN)


def test_the_words_that_save_the_most_tokens_are_added_and_what_they_save_is_exact(own, tmp_path):
    counts = {"lessee": 10, "signed": 3, "lease": 3, "tort": 2}
    saved = {word: count * (len(own.tokenize(word)) - 1) for word, count in counts.items()}
    best = sorted(saved, key=saved.get, reverse=True)[:2]
    note, more = extended(own, tmp_path, 2)
    assert set(more.get_vocab()) - set(own.get_vocab()) == set(best)
    assert length(own) - length(more) == sum(saved[word] for word in best)
    assert f"{1 - length(more) / length(own):.1%} fewer tokens" in note
    assert note.startswith(f"2 words are added to its vocabulary ({best[0]}, {best[1]})")


def test_what_was_there_keeps_its_number_and_other_texts_their_tokens(own, tmp_path):
    _, more = extended(own, tmp_path, 3)
    after = more.get_vocab()
    assert all(after[token] == number for token, number in own.get_vocab().items())
    for text in (*KNOWN, "lessees 北京", "unlessee"):
        if "lessee" not in text:
            assert more(text)["input_ids"] == own(text)["input_ids"]
    assert more.decode(more("the lessee")["input_ids"], skip_special_tokens=True) == "the lessee"
    assert sorted(after.values()) == list(range(len(after)))


def test_words_that_are_named_are_added_as_its_tokenizer_reads_them(own, tmp_path):
    note, more = extended(own, tmp_path, ["Estoppel", "tort", "TORT", "film"])
    assert set(more.get_vocab()) - set(own.get_vocab()) == {"estoppel", "tort"} | ({"film"} - set(own.get_vocab()))
    assert more.tokenize("Estoppel") == ["estoppel"]
    assert "words are added" in note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["force majeure"], "'force majeure' is 2 words to its tokenizer (force majeure): leave it out"),
        (["ex-ante"], "'ex-ante' is 3 words to its tokenizer (ex - ante)"),
        ([" "], "' ' is 0 words"),
        (["the"], "its vocabulary has all of these words already"),
    ],
)
def test_words_that_cannot_be_added_are_named_and_nothing_is_written(own, tmp_path, words, message):
    if words == ["the"]:
        assert own.tokenize("the") == ["the"]
    with pytest.raises(UserError) as error:
        extended(own, tmp_path, words)
    assert message in str(error.value)
    assert not (tmp_path / "more").exists()


def test_pairs_of_bytes_are_refused(tmp_path):
    learn_tokenizer("bpe", lambda: iter(KNOWN), 300, False, tmp_path / "bytes")
    with pytest.raises(UserError, match="bytes: not a vocabulary of WordPiece"):
        extended(load_tokenizer(tmp_path / "bytes"), tmp_path, 3)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_vocabulary_that_cannot_be_extended_is_seen_before_anything_runs(tmp_path, kind):
    section = pretrain_section(model="model", tokenizer={"extend": {"words": 3}})
    path = write_recipe(tmp_path, {"base": {"pretrain": section}})
    learn_tokenizer(kind, lambda: iter(KNOWN), 300 if kind == "bpe" else 90, kind != "bpe", tmp_path / "words")
    for file in (tmp_path / "words").iterdir():
        shutil.copy(file, tmp_path / "model")
    recipe = load_recipe(path)
    if kind == "wordpiece":
        assert "base" in check_recipe(recipe, load_stages(recipe))
        return
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: .*model: not a vocabulary of WordPiece.*leave out tokenizer.extend"):
        check_recipe(recipe, load_stages(recipe))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 64])
def test_a_new_row_is_the_mean_of_its_pieces_and_no_other_row_changes(own, tmp_path, tied, spare):
    _, more = extended(own, tmp_path, 3)
    model = tiny_masked_lm(vocab_size=len(own) + spare, tie_word_embeddings=tied)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight, model.get_output_embeddings().bias]
    before = [table.detach().clone() for table in tables]
    fit_tokenizer(model, more)
    fit_new_words(model, more, own)
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight, model.get_output_embeddings().bias]
    new = sorted(set(more.get_vocab()) - set(own.get_vocab()))
    assert len(new) == 3
    for old, table in zip(before, tables, strict=True):
        torch.testing.assert_close(table[: len(own)], old[: len(own)], rtol=0, atol=0)
        for word in new:
            pieces = own(word, add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(table[more.get_vocab()[word]], old[pieces].mean(0))


def test_a_model_goes_on_with_more_words(tmp_path, capsys):
    rows = ragged_rows(48)
    write_rows(tmp_path / "rows.jsonl", [{**row, "text": f"filmography {row['text']} unfilmable"} for row in rows])
    section = pretrain_section(
        model="model",
        tokenizer={"extend": {"words": ["filmography", "unfilmable"]}},
        train=train_section(steps=4, evaluate_every=2, learning_rate=1e-9),
    )
    recipe = write_recipe(tmp_path, {"more": {"pretrain": section}})
    own = load_tokenizer(tmp_path / "model")
    directory = run_here(recipe, "more", tmp_path / "runs").directory
    out = capsys.readouterr().out
    assert "2 words are added to its vocabulary" in out
    assert "those of the words that were added begin as the mean of their pieces" in out
    more = load_tokenizer(directory)
    table = read_weights(directory)["bert.embeddings.word_embeddings.weight"]
    for word in ("filmography", "unfilmable"):
        torch.testing.assert_close(table[more.get_vocab()[word]], table[own.unk_token_id], rtol=0, atol=1e-6)
    assert len(set(more.get_vocab()) - set(own.get_vocab())) == 2
    assert table.shape[0] > max(more.get_vocab().values())
