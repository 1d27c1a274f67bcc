"""Token corpora: nothing of a text is lost that the ledger does not tell."""

import json

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.data.corpus import CHUNK, Corpus, CorpusWriter
from engine.models import load_tokenizer
from tests.recipes import pretrain_section, ragged_rows, run_here, train_section, write_model, write_recipe, write_rows
from tests.unit.models import WORDS, tiny_tokenizer

WORD = st.sampled_from([*WORDS, "", "zebra"])


def bake(directory):
    """Switches truncation and padding on in tokenizer.json, as sentence-transformers ships it."""
    path = str(directory / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6, pad_id=0, pad_token="[PAD]")
    tokenizer.save(path)


def write(directory, texts, tokenizer):
    writer = CorpusWriter(tokenizer, directory)
    for text in texts:
        writer.add(text)
    writer.close()
    return Corpus.open(directory)


@given(st.lists(st.lists(WORD, max_size=12).map(" ".join), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
def test_the_ledger_counts_what_went_in_and_what_came_of_it(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("corpus")
    texts = [*texts, "the film", "ﬁlm é"]
    tokenizer = tiny_tokenizer(directory).backend_tokenizer
    tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    corpus = write(directory / "train", texts, tokenizer)
    assert corpus.ledger == {
        "documents": sum(bool(ids) for ids in tokens),
        "empty_documents": sum(not ids for ids in tokens),
        "characters": sum(map(len, texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": sum(map(len, tokens)),
        "unknown_tokens": sum(ids.count(1) for ids in tokens),
    }
    assert np.array_equal(corpus.tokens, [token for ids in tokens for token in ids])
    assert np.array_equal(corpus.ends, np.cumsum([len(ids) for ids in tokens if ids]))
    assert Corpus.open(directory / "train").ledger == corpus.ledger


def test_more_documents_than_are_tokenized_at_a_time_are_all_there(tmp_path):
    corpus = write(tmp_path / "train", ["the film"] * (2 * CHUNK + 1), tiny_tokenizer(tmp_path).backend_tokenizer)
    assert corpus.ledger["tokens"] == len(corpus.tokens) == 2 * (2 * CHUNK + 1)


def test_long_documents_are_tokenized_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.corpus.CHUNK_CHARACTERS", 100)
    writer, chunks = CorpusWriter(tiny_tokenizer(tmp_path).backend_tokenizer, tmp_path / "train"), []
    encode = writer.encode

    def counted(texts, **options):
        chunks.append(len(texts))
        return encode(texts, **options)

    writer.encode = counted
    for text in ["film " * 10] * 7 + ["film " * 50]:
        writer.add(text)
    assert writer.close()["tokens"] == 120
    assert chunks == [2, 2, 2, 2, 0]


def test_truncation_and_padding_of_a_tokenizer_file_never_apply(tmp_path):
    bake(write_model(tmp_path / "model"))
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(tokenizer.backend_tokenizer.encode(" ".join(["film"] * 50), add_special_tokens=False).ids) == 50
    baked = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert write(tmp_path / "train", [" ".join(["film"] * 50), "film"], baked).ledger["tokens"] == 51


def test_a_pretraining_on_a_tokenizer_with_truncation_sees_every_token_and_records_the_ledger(tmp_path):
    rows = ragged_rows(40)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "\u200b"}])
    recipe = write_recipe(tmp_path, {"base": {"pretrain": pretrain_section(train=train_section(steps=1))}})
    bake(tmp_path / "model")
    record = json.loads((run_here(recipe, "base", tmp_path / "runs").directory / "stage.json").read_text())
    told = record["corpus"]
    assert sum(told[name]["tokens"] for name in told) == sum(len(row["text"].split()) for row in rows)
    assert sum(told[name]["documents"] for name in told) == 40
    assert sum(told[name]["empty_documents"] for name in told) == 1
