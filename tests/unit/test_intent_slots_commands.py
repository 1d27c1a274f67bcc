"""Intent and slots on the command line: a recipe from a directory or JSON lines, and what `check` sees in the files."""

import json

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from launch.check import check_recipe
from launch.cli import main
from launch.recipe import load_stages
from tests.recipes import finetune_section, write_commands, write_model, write_recipe


def _run(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code


def as_json(directory, **columns):
    """The rows of such a directory as JSON lines, whose columns have these names."""
    files = [(directory / name).read_text().splitlines() for name in ("seq.in", "seq.out", "label")]
    names = [columns.get(name, name) for name in ("tokens", "slots", "intent")]
    rows = [zip(names, (words.split(), tags.split(), intent), strict=True) for words, tags, intent in zip(*files, strict=True)]
    return "".join(json.dumps(dict(row)) + "\n" for row in rows)


@pytest.mark.parametrize("columns", [None, {}, {"tokens": "words", "slots": "tags", "intent": "intent_label"}])
def test_a_recipe_is_made_from_a_directory_and_from_json_lines(tmp_path, monkeypatch, capsys, columns):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    data = str(write_commands(tmp_path / "train", 60).name)
    if columns is not None:
        data = "rows.jsonl"
        (tmp_path / data).write_text(as_json(tmp_path / "train", **columns))
    _run(["new", "--data", data, "--model", "model", "--output", "made.yaml"])
    said = capsys.readouterr().out
    assert "task: intent_slots" in said and "entities of 2 types: PLACE, WORK; tags in bio" in said and "2 intents" in said
    _run(["check", "made.yaml"])
    config = load_stages(load_recipe(tmp_path / "made.yaml"))[0].config
    names = columns or {"tokens": "tokens", "slots": "slots", "intent": "intent"}
    assert (config.task.text, config.task.label, config.task.intent) == tuple(names.values())


def test_rows_without_an_intent_are_tagged_and_rows_without_slots_classified(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    rows = [json.loads(line) for line in as_json(write_commands(tmp_path / "train", 60)).splitlines()]
    for left_out, task in (("intent", "tagging"), ("slots", "classification")):
        kept = [{key: value for key, value in row.items() if key != left_out} for row in rows]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        _run(["new", "--data", f"{task}.jsonl", "--model", "model"])
        assert f"task: {task}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "settings", "message"),
    [
        ("label", "one\n" * 3, [], r"label:3: ends here, but .*seq.in goes on: line by line they must belong together"),
        ("seq.out", "O O O O O O O O O O\n" * 60, [], r"seq.out:1: 10 tags for the \d+ words in seq.in"),
        ("label", "\n" * 60, [], r"seq.in:1: column 'intent' is empty in this row"),
        ("label", "one\n" * 60, ["intent_names={two: x}"], r"task.intent_names: 'two' is no intent of column 'intent'"),
        ("label", "one\n" * 60, ["stride=40"], r"task.stride=40: windows of max_length=32 tokens cannot share as many"),
        ("label", "one\n" * 60, ["intent=goal"], r"seq.in:1: no column 'goal' in this row"),
        ("label", "one\n" * 60, ["metric=f1"], r"metric: input should be 'exact', 'intent_accuracy' or 'slot_f1'"),
    ],
)
def test_check_names_what_would_stop_the_stage(tmp_path, file, text, settings, message):
    write_commands(tmp_path / "rows", 60)
    (tmp_path / "rows" / file).write_text(text)
    section = finetune_section(task={"type": "intent_slots"}, data={"train": "rows"})
    write_recipe(tmp_path, {"teacher": {"finetune": section}})
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"teacher.task.{setting}" for setting in settings])
    with pytest.raises(UserError, match=message):
        check_recipe(recipe, load_stages(recipe))
