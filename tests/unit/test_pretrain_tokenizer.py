"""The tokenizer of a pretraining: any directory with a tokenizer will do, if it has the special tokens of packed rows."""

import json

import numpy as np
import pytest

from engine.config import load_recipe
from engine.data.vocabulary import learn_tokenizer
from engine.errors import UserError
from engine.models import load_tokenizer
from engine.objectives.mlm import Objective
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import finetune_section, pretrain_section, write_recipe
from tests.unit.models import tiny_tokenizer

ALONE = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def recipe(tmp_path):
    """A pretraining with a directory `words` that holds the two files of a tokenizer and nothing else."""
    tiny_tokenizer(tmp_path / "words").save_pretrained(tmp_path / "words")
    for path in (tmp_path / "words").iterdir():
        if path.name not in ALONE:
            path.unlink()
    return write_recipe(tmp_path, {"base": {"pretrain": pretrain_section(tokenizer="words")}})


def check(path):
    loaded = load_recipe(path)
    return check_recipe(loaded, load_stages(loaded))


def change(path, **values):
    """Sets keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_a_tokenizer_needs_no_model(recipe, tmp_path):
    assert "base" in check(recipe)
    (stage,) = load_stages(load_recipe(recipe))
    tokenizer = load_tokenizer(stage.recipe.find(stage.config.tokenizer.model, "tokenizer"))
    Objective.require(tokenizer)
    assert len(tokenizer) == len(tiny_tokenizer(tmp_path / "again"))
    assert stage.inputs["tokenizer.model"]["sha256"]


def test_a_model_still_needs_its_configuration(recipe, tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(model="words")}})
    with pytest.raises(UserError, match=r"words: not a model directory \(no config.json\)"):
        check(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda words: (words / "tokenizer.json").unlink(), "no tokenizer in it"),
        (
            lambda words: (words / "tokenizer_config.json").unlink(),
            "tokenizer_config.json: no such file: it says which",
        ),
        (lambda words: (words / "tokenizer_config.json").write_text("[]"), "not the configuration of a tokenizer"),
        (
            lambda words: change(words / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", mask_token=None),
            "tokenizer_config.json: names no mask_token, which masked language modelling needs",
        ),
    ],
)
def test_a_directory_that_gives_no_tokenizer_for_pretraining_is_named(recipe, tmp_path, spoil, message):
    spoil(tmp_path / "words")
    with pytest.raises(UserError) as caught:
        check(recipe)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{recipe}:")


def test_a_special_token_that_only_the_loaded_tokenizer_shows_to_be_missing_is_named(recipe, tmp_path):
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (tmp_path / "words/tokenizer_config.json").write_text(json.dumps(named))
    missing = [name for name in Objective.special_tokens if name not in named]
    assert missing
    with pytest.raises(UserError, match=f"words: this tokenizer has no {', '.join(missing)}, which"):
        Objective.require(load_tokenizer(tmp_path / "words"))


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_same_texts_give_the_same_vocabulary(tmp_path, kind):
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(400)]  # many merges are as good
    texts = [" ".join(rng.choice(words, 30)) for _ in range(200)]
    found = []
    for turn in range(4):
        learn_tokenizer(kind, lambda: iter(texts), 600, True, tmp_path / f"{turn}")
        found.append(load_tokenizer(tmp_path / f"{turn}").get_vocab())
    assert all(vocabulary == found[0] for vocabulary in found)
    assert 500 < len(found[0]) <= 600


def test_a_word_piece_vocabulary_has_every_character_in_each_of_its_places(tmp_path):
    learn_tokenizer("wordpiece", lambda: iter(["ab abc", "Äb c"]), 100, True, tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    vocabulary = tokenizer.get_vocab()
    assert {"a", "b", "c", "##b", "##c"} <= vocabulary.keys()
    assert "##a" not in vocabulary
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer.tokenize("##b") == ["[UNK]", "[UNK]", "b"], "a piece is no special token that a text could name"


@pytest.mark.parametrize(("vocab_size", "missing"), [(8000, 5), (4000, 1000), (1500, 2000)])
def test_a_script_of_many_letters_has_as_many_of_them_as_it_needs_up_to_half_of_the_vocabulary(tmp_path, vocab_size, missing):
    letters = [chr(0x4E00 + number) for number in range(3000)]
    texts = ["".join(letters[:1000])] * 3 + ["".join(letters[:2000])] * 2 + ["".join(letters)]
    learn_tokenizer("wordpiece", lambda: iter(texts), vocab_size, True, tmp_path / "words")
    tokenizer = load_tokenizer(tmp_path / "words")
    # The five rarest letters of 3,000 are 0.05 % of the texts.
    assert tokenizer(texts[-1])["input_ids"].count(tokenizer.unk_token_id) == missing
    assert len(tokenizer) <= vocab_size
