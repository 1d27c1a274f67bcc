"""A corpus that two processes make, killed and begun again, has the bytes of one that a single process made."""

import pytest

from engine.stages.stage import hash_directory, read_stage
from tests.distributed.conftest import Bothways, kill, succeed
from tests.recipes import corpus_section, pretrain_section, ragged_rows, read_history, write_recipe, write_rows

FILES = [f"part{number}.jsonl" for number in range(6)]
TOGETHER = ("--set", "text.processes=2", "--set", "base.parallel=zero2", "--set", "base.processes=2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    for number, name in enumerate(FILES):
        write_rows(directory / name, ragged_rows(3000, number))
    base = {"corpus": "text", **{key: value for key, value in pretrain_section().items() if key not in ("data", "tokenizer")}}
    text = corpus_section(data={"train": FILES, "validation": "5%"}, shard_tokens=10_000)
    return write_recipe(directory, {"text": {"corpus": text}, "base": {"pretrain": base}})


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory):
    runs = tmp_path_factory.mktemp("alone") / "runs"
    out = succeed(Bothways(texts, runs, "--stage", "text"))
    assert "files: 6, read in 6 parts by 1 process" in out
    return runs / "tiny" / "text"


def test_two_processes_make_the_bytes_of_one_and_train_on_them(texts, alone, tmp_path):
    out = succeed(Bothways(texts, tmp_path / "runs", *TOGETHER))
    assert "files: 6, read in 6 parts by 2 processes" in out
    shards = len(list((alone / "corpus").glob("*/train/tokens.bin")))
    assert shards > 6 and f"of {shards} shards" in out and f"tokens, shards: {shards}" in out
    ours = tmp_path / "runs/tiny"
    assert hash_directory(ours / "text" / "corpus") == hash_directory(alone / "corpus")
    assert read_stage(ours / "text")["files"] == read_stage(alone)["files"]
    assert len(read_history(ours / "base")) > 3
    assert "[1/2] text (corpus): skipped, unchanged" in succeed(Bothways(texts, tmp_path / "runs", *TOGETHER))


def test_kill_9_of_one_of_two_processes_then_run_again_gives_the_same_bytes(texts, alone, tmp_path):
    arguments = ("--stage", "text", *TOGETHER[:2])
    run = Bothways(texts, tmp_path / "runs", *arguments)
    shards = tmp_path / "runs/tiny/text.partial/corpus"
    run.when(lambda: len(list(shards.glob("*/part.json"))) >= 3, "three shards")
    kill(next(record.pid for record in run.records() if record.rank == 1))
    status, _, err = run.wait()
    assert status == 1 and "process 1 of stage 'text' was killed" in err
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("*[0-9]/*/tokens.bin")}
    assert len(kept) >= 3 and not (tmp_path / "runs/tiny/text").exists()
    succeed(Bothways(texts, tmp_path / "runs", *arguments))
    made = tmp_path / "runs/tiny/text/corpus"
    assert all((made / path.relative_to(shards)).stat().st_mtime_ns == before for path, before in kept.items())
    assert hash_directory(made) == hash_directory(alone / "corpus")


def test_a_bad_row_that_one_process_finds_stops_both_with_its_place(texts, tmp_path):
    for path in [*texts.parent.glob("*.jsonl"), texts.parent / "model"]:
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / FILES[1]).unlink()
    write_rows(tmp_path / FILES[1], [*ragged_rows(2990, 1), {"txt": "a"}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(texts.read_text())
    status, _, err = Bothways(recipe, tmp_path / "runs", "--stage", "text", *TOGETHER[:2]).wait()
    assert status == 2
    assert err.splitlines() == [f"error: {tmp_path / FILES[1]}:2991: no column 'text' in this row: did you mean 'txt'?"]
