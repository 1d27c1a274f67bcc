"""Token shards: the same however many processes make them and however often they are killed; nothing of a text is lost."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from engine.config import load_recipe
from engine.data import corpus as documents
from engine.data import shards as rooms
from engine.data.corpus import Corpus
from engine.data.packed import PackedBatches
from engine.data.shards import SPLITS, Builder, Shards, units_of
from engine.data.splits import DataConfig, split_of
from engine.errors import UserError
from engine.objectives import mlm
from engine.stages.stage import hash_directory
from tests.recipes import ragged_rows, write_recipe, write_rows
from tests.unit.models import tiny_tokenizer
from tests.unit.test_packed_families import Tokens

CHUNK = 64
FILES = {"a.jsonl": 700, "b.jsonl": 40, "c.jsonl": 30, "d.jsonl": 2500}
SHARD = 3000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(documents, "CHUNK", CHUNK)


@pytest.fixture
def data(tmp_path):
    for number, (name, rows) in enumerate(FILES.items()):
        write_rows(tmp_path / name, [*ragged_rows(rows, number), {"text": "\u200b"}])
    return DataConfig.model_validate({"train": list(FILES), "validation": "10%", "test": "5%"})


@pytest.fixture
def build(tmp_path, data):
    recipe, tokenizer = load_recipe(write_recipe(tmp_path)), tiny_tokenizer(tmp_path).backend_tokenizer

    def builder(name, **changes):
        return Builder(changes.get("data", data), recipe, "text", tokenizer, tmp_path / name, True, changes.get("shard", SHARD))

    return builder


def tokens_of(corpora):
    return np.concatenate([corpus.tokens for corpus in corpora]).tolist()


def test_the_shards_hold_every_token_of_their_split_in_order(tmp_path, data, build):
    alone = build("alone")
    alone.together(0, 1, lambda: None)
    tokenizer = tiny_tokenizer(tmp_path).backend_tokenizer
    texts = [json.loads(line)["text"] for name in FILES for line in (tmp_path / name).read_text().splitlines()]
    assert [split_of(data, text) for text in texts].count("test") > 50
    for split in SPLITS:
        mine = [text for text in texts if split_of(data, text) == split]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in mine]
        corpus = Shards(alone.directory, split)
        assert tokens_of(corpus) == [token for each in ids for token in each]
        assert sum(len(shard.ends) for shard in corpus) == corpus.ledger["documents"] == sum(map(bool, ids))
        assert corpus.ledger["empty_documents"] == len(ids) - corpus.ledger["documents"]
        assert corpus.ledger["characters"] == sum(map(len, mine))
        assert corpus.ledger["tokens"] == sum(map(len, ids))
    assert len(Shards(alone.directory, "train")) > 4
    assert len(Shards(alone.directory, "train").sample(100)) < 200


def test_small_neighbours_are_read_as_one_and_a_large_file_fills_several_shards(tmp_path, data):
    recipe = load_recipe(write_recipe(tmp_path))
    units = units_of(data, recipe, SHARD)
    assert [list(FILES)[unit.files] for unit in units] == [["a.jsonl"], ["b.jsonl", "c.jsonl", "d.jsonl"]]
    assert [list(FILES)[unit.files] for unit in units_of(data, recipe, 10**6)] == [list(FILES)]
    assert [unit.files for unit in units_of(data, recipe, 1)] == [slice(number, number + 1) for number in range(4)]
    limited = DataConfig.model_validate(
        {"train": {"path": list(FILES), "limit": 900}, "validation": "b.jsonl", "test": "c.jsonl"}
    )
    assert [(unit.split, unit.files) for unit in units_of(limited, recipe, 1)] == [
        ("validation", slice(0, 1)),
        ("train", slice(0, 4)),
    ]


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_any_number_of_processes_makes_the_same_shards(build, processes):
    build("alone").together(0, 1, lambda: None)
    for rank in reversed(range(processes)):
        build("many").build(rank, processes)
    build("many").finish()
    one, many = (hash_directory(build(name).directory) for name in ("alone", "many"))
    assert one == many
    assert len(one) > 40


@pytest.mark.parametrize("rows", [1, 500, 800, 2000, 3200])
def test_killed_anywhere_it_goes_on_and_makes_the_same_shards(monkeypatch, build, rows):
    build("alone").together(0, 1, lambda: None)
    seen = []
    original = rooms.split_of

    def until_killed(data, text):
        seen.append(text)
        if len(seen) > rows:
            raise KeyboardInterrupt
        return original(data, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rooms, "split_of", until_killed)
        build("killed").build()
    kept = {path: path.stat().st_mtime_ns for path in build("killed").directory.rglob("tokens.bin") if ".tmp" not in str(path)}
    assert kept or rows < 500
    for left in build("killed").directory.glob("*.tmp"):
        (left / "left").write_text("of a process that was killed")
    again = build("killed")
    again.together(0, 1, lambda: None)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert hash_directory(again.directory) == hash_directory(build("alone").directory)


def test_more_documents_and_longer_ones_than_are_tokenized_at_a_time_are_all_there(tmp_path, build):
    rows = [{"text": "the film"}] * (CHUNK + 1) + [{"text": "great film " * 400_000}] * 2 + [{"text": "bad"}] * CHUNK
    write_rows(tmp_path / "a.jsonl", rows)
    data = DataConfig.model_validate({"train": "a.jsonl", "validation": "b.jsonl"})
    builder = build("corpus", data=data, shard=10**9)
    builder.together(0, 1, lambda: None)
    (corpus,) = Shards(builder.directory, "train")
    assert np.diff(corpus.ends, prepend=0).tolist() == [2] * (CHUNK + 1) + [800_000] * 2 + [1] * CHUNK


def test_notes_of_files_and_rows_left_out_are_told_once_also_after_a_kill(tmp_path, build, capsys):
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*ragged_rows(50), {"text": None}, {"text": ""}])
    data = DataConfig.model_validate({"train": {"path": ["a.jsonl", "e.jsonl.gz"], "missing": "drop"}, "validation": "10%"})
    for _ in range(2):
        builder = build("corpus", data=data, shard=100)
        builder.together(0, 1, lambda: None)
        notes = capsys.readouterr().out.splitlines()
        assert len(notes) == len(set(notes)) == 3
        assert any("2 rows without text left out" in note for note in notes)


def test_a_split_without_a_token_is_refused_by_its_name(tmp_path, build):
    write_rows(tmp_path / "b.jsonl", [{"text": "\u200b"}])
    data = DataConfig.model_validate({"train": "a.jsonl", "validation": "b.jsonl"})
    with pytest.raises(UserError, match="the validation texts hold no token"):
        build("corpus", data=data).together(0, 1, lambda: None)


def test_a_bad_row_is_named_and_what_is_complete_stays(tmp_path, build):
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write('{"text": "cut off')
    with pytest.raises(UserError, match=r"d\.jsonl:2502"):
        build("corpus").build()
    assert {path.suffix for path in build("corpus").directory.iterdir()} >= {"", ".json"}
    assert all(
        isinstance(Corpus.open(path.parent), Corpus) for path in Path(build("corpus").directory).glob("*[0-9]/*/tokens.bin")
    )


def test_equal_pieces_of_two_shards_are_corrupted_each_in_its_own_way():
    corpus = Corpus(np.arange(5, 405, dtype=np.uint16), np.asarray([200, 400]))
    objective = mlm.Objective(mlm.Config(), 500, 4, [0, 1, 2, 3, 4])
    batches = PackedBatches({"": [corpus, corpus]}, objective, Tokens, 64, 4, 1)
    half = batches.rows // 2
    first, second = ([batches.row(0, half * shard + number) for number in range(half)] for shard in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert (one["segments"] == other["segments"]).all()
        assert (one["labels"] != other["labels"]).any()


def test_each_rank_counts_the_rows_of_shards_of_its_own():
    shards = [Corpus(np.full(size, 7, dtype=np.uint16), np.asarray([size])) for size in (100, 300, 500)]
    objective = mlm.Objective(mlm.Config(), 500, 4, [0, 1, 2, 3, 4])
    whole = PackedBatches({"": shards}, objective, Tokens, 64, 4, 1)
    told = []

    class Ranks:
        rank, processes = 1, 2

        def sum(self, *values):
            told.append(np.reshape(values, (3, 3)))
            others = np.diff(np.stack([whole.ends, whole.pieces, whole.tokens], 1), axis=0, prepend=0) - told[0]
            return (told[0] + others).flatten().tolist()

    shared = PackedBatches({"": shards}, objective, Tokens, 64, 4, 1, ranks=Ranks())
    assert told[0][1].all() and not told[0][[0, 2]].any()
    assert (shared.ends == whole.ends).all() and shared.describe == whole.describe
