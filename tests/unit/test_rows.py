"""Rows of a stage: encoded once to disk, and then what they would have been in memory."""

import contextlib

import numpy as np
import pytest

from engine.config import load_recipe
from engine.data import rows as rows_module
from engine.data.rows import LabelledBatches, prepare, prepare_on_disk
from engine.data.splits import load_splits
from engine.errors import UserError
from engine.finetune import FinetuneConfig
from engine.models import load_tokenizer
from engine.tasks import task_class
from tests.recipes import finetune_section, ragged_rows, write_recipe, write_rows


class One:
    """The only rank."""

    main_first = staticmethod(contextlib.nullcontext)


@pytest.fixture
def section(tmp_path, monkeypatch):
    """A stage whose rows are encoded in several chunks, some of them cut."""
    monkeypatch.setattr(rows_module, "CHUNK", 7)
    monkeypatch.setattr("engine.data.stored.PIECE", 5)
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(max_length=12)}})
    loaded = load_recipe(path)
    return loaded.section("teacher", FinetuneConfig), loaded


def on_disk(section, directory, learn=None, **more):
    config, recipe = section
    learn = learn or (lambda rows: task_class(config.task).learn(config.task, rows))
    return prepare_on_disk(config, recipe, directory, One, load_tokenizer(recipe.find_model(config.model)), learn, **more)


def in_memory(section):
    config, recipe = section
    wanted = config.task
    rows = load_splits(config.data, recipe, wanted.split_by, wanted.columns, wanted.classes_of)
    kind, tokenizer = task_class(wanted), load_tokenizer(recipe.find_model(config.model))
    return prepare(rows, kind(wanted, kind.learn(wanted, rows["train"]), tokenizer, config.max_length))


def plain(examples):
    return [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in example.items()} for example in examples]


def test_rows_on_disk_are_those_in_memory(section, tmp_path):
    stored, held = on_disk(section, tmp_path / "store"), in_memory(section)
    assert stored.task.facts == held.task.facts
    assert stored.describe == held.describe
    assert stored.task.truncated > 0
    assert list(stored.rows) == list(held.rows)
    for name in held.rows:
        assert list(stored.rows[name]) == list(held.rows[name])
        assert plain(stored.examples[name]) == held.examples[name]


def test_batches_from_disk_are_those_from_memory(section, tmp_path):
    stored, held = on_disk(section, tmp_path / "store"), in_memory(section)
    batches = [LabelledBatches(data.examples["train"], data.task, 8, seed=3) for data in (stored, held)]
    for step in range(2 * batches[1].steps_per_epoch):
        for one, other in zip(*(b.at(step, 1, 2, 2) for b in batches), strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_rows_are_read_and_encoded_once(section, tmp_path, monkeypatch):
    before = on_disk(section, tmp_path / "store")
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.setattr(task_class(section[0].task), "encode", None)
    again = on_disk(section, tmp_path / "store", learn=None)
    assert plain(again.examples["train"]) == plain(before.examples["train"])
    assert (again.describe, again.notes) == (before.describe, before.notes)


def test_a_row_that_cannot_be_encoded_is_named_and_leaves_no_store(section, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ragged_rows(64), {"text": "the end", "label": None}])
    with pytest.raises(UserError, match=f"^{path}:65: column 'label' is empty"):
        on_disk(section, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_rows_that_are_added_are_trained_on_and_on_nothing_else(section, tmp_path):
    asked = []

    def more(rows):
        asked.append({name: len(split) for name, split in rows.items()})
        return [{"text": "a warm film"}] * 3

    plainly, data = on_disk(section, tmp_path / "a"), on_disk(section, tmp_path / "b", more=more)
    assert asked == [{name: len(split) for name, split in plainly.rows.items()}]
    assert len(data.examples["train"]) == len(data.rows["train"]) + 3
    assert [example["label"] for example in data.examples["train"][-3:]] == [None] * 3
    assert plain(data.examples["test"]) == plain(plainly.examples["test"])


def test_a_class_that_would_be_held_out_as_a_whole_is_moved_on_disk_too(section, tmp_path):
    rows = [{"text": f"film {number}", "label": number % 2 if number < 60 else "rare"} for number in range(400)]
    from engine.data.sources import share_of

    rows = [row for row in rows if row["label"] != "rare" or share_of(row["text"]) < 0.5]
    write_rows(tmp_path / "rows.jsonl", rows)
    stored, held = on_disk(section, tmp_path / "store"), in_memory(section)
    assert "rare" in stored.task.answers.labels
    for name in held.rows:
        assert list(stored.rows[name]) == list(held.rows[name])
    assert any("rare" in note for note in stored.notes)
