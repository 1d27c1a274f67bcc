"""Tagging on the command line: a recipe from a file, entities in colour or as JSON, and the judge of other files."""

import io
import json

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from engine.terminal import coloured
from export.serving.bundle import Bundle
from launch.check import check_recipe
from launch.cli import main
from launch.evaluate import evaluate
from launch.new import new_recipe
from launch.recipe import load_stages
from tests.recipes import finetune_section, run_here, train_section, write_model, write_recipe, write_sentences

TASK = {"type": "tagging"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with rows, a trained model and its fp32 bundle."""
    directory = tmp_path_factory.mktemp("tagging")
    write_sentences(directory / "rows.conll", 120)
    data = {"train": "rows.conll", "validation": "25%"}
    train = train_section(steps=40, learning_rate=3e-3, evaluate_every=40)
    stages = {
        "teacher": {"finetune": {"model": "model", "task": TASK, "data": data, "max_length": 32, "train": train}},
        "engine": {"export": {"model": "teacher", "threads": 1, "rounds": 5, "max_batch": 8}},
    }
    recipe = write_recipe(directory, stages)
    for name in stages:
        run_here(recipe, name, directory / "runs")
    return directory


def bundle_of(made):
    return made / "runs" / "tiny" / "engine"


class Terminal(io.StringIO):
    """Standard output of somebody who looks at it."""

    def isatty(self):
        return True


def predicted(made, monkeypatch, stream, *arguments):
    monkeypatch.setattr("sys.stdout", stream)
    _run(["predict", str(bundle_of(made)), *arguments])
    return stream.getvalue()


def _run(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code


def test_entities_are_in_colour_on_a_terminal_and_json_elsewhere(made, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = "the good film was very long"
    shown = predicted(made, monkeypatch, Terminal(), text)
    assert coloured("good film", "WORK") in shown and "[WORK]" in shown
    (line,) = predicted(made, monkeypatch, io.StringIO(), text).splitlines()
    answer = json.loads(line)
    assert answer["input"] == {"text": text}
    assert [(each["start"], each["end"], each["type"]) for each in answer["entities"]] == [(4, 13, "WORK")]
    monkeypatch.setenv("NO_COLOR", "1")
    assert predicted(made, monkeypatch, Terminal(), text) == line + "\n"


def test_the_words_of_a_file_are_taken_as_they_are(made, monkeypatch):
    (made / "more.conll").write_text("good O\nfilm O\n\nplot O\n")
    lines = predicted(made, monkeypatch, io.StringIO(), "--input", str(made / "more.conll")).splitlines()
    found = [json.loads(line) for line in lines]
    assert found[0]["input"]["text"] == ["good", "film"]
    assert [[each["text"] for each in row["entities"]] for row in found] == [["good film"], ["plot"]]


def test_a_bundle_and_a_model_are_judged_alike_on_another_file_in_another_scheme(made):
    lines, before = [], ""
    for line in (made / "rows.conll").read_text().splitlines():
        word, _, tag = line.partition(" ")
        # IOB1: an entity begins with I, unless one of its type ends right before it.
        lines.append(f"{word} I{tag[1:]}" if tag.startswith("B") and before[1:] != tag[1:] else line)
        before = tag
    (made / "iob1.conll").write_text("\n".join(lines) + "\n")
    reports = []
    for path in (bundle_of(made), made / "runs" / "tiny" / "teacher"):
        same, _ = evaluate(path, [str(made / "rows.conll")], [], None, None, 1)
        other, records = evaluate(path, [str(made / "iob1.conll")], ["scheme=iob1"], None, None, 1)
        assert same["metrics"]["f1"]["value"] == other["metrics"]["f1"]["value"] > 60
        assert records[0].keys() >= {"file", "line", "text", "label", "prediction"}
        reports.append(same["metrics"]["f1"]["value"])
    assert reports[0] == pytest.approx(reports[1])
    with pytest.raises(UserError, match=r"iob1.conll:\d+: word \d+, .*\(scheme bio: mend it, or name another"):
        evaluate(bundle_of(made), [str(made / "iob1.conll")], [], None, None, 1)


def test_the_bundle_tells_what_it_was_judged_by(made):
    bundle = Bundle.open(bundle_of(made))
    assert bundle.manifest.task.facts["marks"] == "bio"
    assert bundle.answers.metric.name == "f1"


def test_a_recipe_is_made_from_a_file_of_columns_and_from_spans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    write_sentences(tmp_path / "a.conll", 60)
    row = {"text": "a good film was bad", "label": {"work": {"good film": [[2, 10]]}}}
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({**row, "text": row["text"] + f" {n}"}) + "\n" for n in range(40)))
    for name, what in (("a.conll", "entities of 2 types: PLACE, WORK; tags in bio"), ("b.jsonl", "entities of 1 types: work")):
        _run(["new", "--data", name, "--model", "model"])
        said = capsys.readouterr().out
        assert "task: tagging" in said and what in said
    _run(["check", "a.yaml"])
    assert "CoNLL with spaces, columns text, label, tags in bio, utf-8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        (
            "a.conll",
            "EU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n",
            "'label': entities of 1 types: ORG; tags in iob1",
        ),
        ("a.jsonl", '{"tokens": ["a", "film"], "pos": ["DET", "NOUN"]}\n', "'pos': 2 tags: DET, NOUN"),
        (
            "a.jsonl",
            '{"tokens": ["a", "b"], "slots": ["O", "B-x"], "to": "y"}\n',
            "'slots': entities of 1 types: x",
        ),
    ],
)
def test_the_column_of_tags_is_found(tmp_path, monkeypatch, capsys, name, text, what):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / name).write_text(text * 40)
    _run(["new", "--data", name, "--model", "model", "--task", "tagging"])
    assert what in capsys.readouterr().out


def test_rows_of_several_labels_are_not_taken_for_tags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a good film", "label": ["JOY", "FUN"]}\n' * 40)
    with pytest.raises(UserError, match="no columns for the task tagging"):
        new_recipe("a.jsonl", None, "tagging", "model", [])


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ("a O\nfilm B-WORK\n\nplot B-WORK\nfilm I-PER\n\n", [], r"rows.conll:4: word 2, 'film': I-PER stands behind B-WORK"),
        ("a O\nfilm B-WORK\n", ["stride=99"], r"task.stride=99: windows of max_length=32 tokens cannot share as many"),
        ("a O\nfilm B-WORK\n", ["metric=accuracy"], r"task.metric=accuracy: these tags mark entities: take f1"),
        ("a DET\nfilm NOUN\n", ["metric=f1"], r"task.metric=f1: these tags do not mark entities: take accuracy"),
    ],
)
def test_check_names_what_would_stop_the_stage(tmp_path, rows, settings, message):
    section = finetune_section(task=TASK, data={"train": "rows.conll"})
    write_recipe(tmp_path, {"teacher": {"finetune": section}})
    (tmp_path / "rows.conll").write_text(rows)
    recipe = load_recipe(tmp_path / "recipe.yaml", [f"teacher.task.{setting}" for setting in settings])
    with pytest.raises(UserError, match=message):
        check_recipe(recipe, load_stages(recipe))
