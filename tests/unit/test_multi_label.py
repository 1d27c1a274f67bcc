"""The task of several labels: its forms of rows, its loss, its thresholds, what it refuses."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.tasks import FACTS, multi_label
from engine.tasks._texts import TextConfig
from tests.recipes import finetune_section, run_here, write_recipe, write_rows
from tests.unit.models import INPUTS, tiny_classifier, tiny_tokenizer

ROWS = [
    {"text": "a good film", "label": ["warm", "short"]},
    {"text": "bad", "label": []},
    {"text": "the plot was very very dull", "label": ["long"]},
]


def task_of(directory, rows=ROWS, **section):
    config = multi_label.Config(type="multi_label", **section)
    return multi_label.Task(config, multi_label.Task.learn(config, rows), tiny_tokenizer(directory), 16)


@pytest.fixture
def task(tmp_path):
    return task_of(tmp_path)


def gives(probabilities):
    """A model that gives these probabilities."""
    values = np.array(probabilities, dtype=np.float32)
    return lambda graph, arrays: {"logits": np.log(values / (1 - values))}


def read(config: TextConfig, row):
    """A row as it is when its cells have been read."""
    return {**row, **{column: cell(row[column]) for column, cell in config.columns.items()}}


def test_the_loss_is_hugging_faces_loss_times_the_rows(task):
    model = tiny_classifier(num_labels=3, problem_type="multi_label_classification")
    batch = task.collate(task.encode(ROWS))
    targets = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    theirs = model(**{key: batch[key] for key in INPUTS}, labels=targets)
    total, count = task.loss(model, batch)
    assert count == task.count(batch) == 3
    torch.testing.assert_close(total / count, theirs.loss)


def test_unlabelled_rows_enter_neither_sum_nor_count(task):
    logits = torch.randn(4, 3)
    total, count = task.loss_of({"logits": logits}, task.collate(task.encode([*ROWS, {"text": "a film"}])))
    expected = task.loss_of({"logits": logits[:3]}, task.collate(task.encode(ROWS)))
    assert count == 3
    torch.testing.assert_close(total, expected[0])


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ({}, {"text": "a", "label": ["warm", "short", "warm"]}),
        ({"separator": ","}, {"text": "a", "label": "warm, short,"}),
        ({"label": ["warm", "short", "long"]}, {"text": "a", "warm": 1, "short": "true", "long": "0"}),
        ({"label": ["warm", "short"], "names": {}}, {"text": "a", "warm": True, "short": 1.0}),
        ({"names": {"w": "warm"}}, {"text": "a", "label": ["w", "short"]}),
    ],
)
def test_a_list_a_separated_text_and_columns_of_marks_say_the_same(section, row):
    config = multi_label.Config(type="multi_label", **section)
    assert sorted(config.classes_of(read(config, row))) == ["short", "warm"]
    assert sorted(config.classes_of(row)) == ["short", "warm"], "before its cells were read, too"


@pytest.mark.parametrize(
    ("section", "row", "said"),
    [
        ({}, {"label": "warm short"}, "no list of labels"),
        ({}, {"label": "warm,short"}, "no list of labels: write a list, or say task.separator"),
        ({}, {"label": {"a": 1}}, "no list of labels"),
        ({}, {"label": [["warm"]]}, "no list of labels"),
        (
            {"label": ["warm", "short"]},
            {"warm": 1, "short": "yes"},
            "'short' holds 'yes': a column of one label holds 1 or 0",
        ),
        ({}, {"label": None}, "column 'label' is empty"),
    ],
)
def test_what_is_no_list_of_labels_is_refused_with_file_and_line(tmp_path, section, row, said):
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(task={"type": "multi_label", **section})}})
    columns = section.get("label")
    good = dict.fromkeys(columns, 1) if columns else {"label": ["warm"]}
    path = write_rows(tmp_path / "rows.jsonl", [*({"text": f"a film {n}", **good} for n in range(8)), {"text": "bad", **row}])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:9: .*{said}"):
        run_here(recipe, "teacher", tmp_path / "runs")


def test_a_label_that_training_never_saw_is_named(task):
    with pytest.raises(UserError, match="label 'worm' is not among the training labels: did you mean 'warm'"):
        task.encode([{"text": "a", "label": ["worm"]}])


def test_rows_without_any_label_are_refused(tmp_path):
    with pytest.raises(UserError, match="no training row has a label"):
        task_of(tmp_path, [{"text": "a", "label": []}])


def test_keys_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="separator"):
        multi_label.Config(type="multi_label", label=["a", "b"], separator=",")
    with pytest.raises(ValueError, match="twice"):
        multi_label.Config(type="multi_label", label=["a", "a"])


def test_a_label_is_given_from_its_own_threshold_on(task):
    task.know({"thresholds": [0.2, 0.9, 0.5]})
    answers = task.answers.answer(gives([[0.3, 0.8, 0.4], [0.1, 0.95, 0.6]]), ROWS[:2])
    assert [answer["labels"] for answer in answers] == [["long"], ["short", "warm"]]


def test_thresholds_are_chosen_for_each_label_and_old_answers_are_revised_by_them(task):
    rows = [{"text": "a", "label": ["long"] if n < 6 else ["warm"] * (n < 9)} for n in range(20)]
    scores = [[0.3 if n < 6 else 0.1, 0.2, 0.6 if n < 9 else 0.55] for n in range(20)]
    answers = task.answers.answer(gives(scores), rows)
    assert not any("long" in answer["labels"] for answer in answers)
    chosen = task.answers.choose(answers, rows)
    assert chosen["thresholds"] == pytest.approx([0.2, 0.5, 0.5], abs=1e-6), "a label on fewer than 5 rows keeps a half"
    task.know(chosen)
    again = task.answers.revised(answers)
    assert ["long" in answer["labels"] for answer in again] == [n < 6 for n in range(20)]
    assert again == task.answers.answer(gives(scores), rows)


def test_thresholds_come_back_from_a_models_configuration(task):
    task.know({"thresholds": [0.25, 0.5, 0.75]})
    settings = task.settings()
    assert settings[FACTS]["thresholds"] == [0.25, 0.5, 0.75]
    assert multi_label.Task.recall(task.config, SimpleNamespace(**settings)) == task.facts
    theirs = SimpleNamespace(**{**settings, FACTS: None})
    assert multi_label.Task.recall(task.config, theirs)["thresholds"] == [0.5] * 3, "somebody else's model"
    with pytest.raises(UserError, match="none of several labels"):
        multi_label.Task.recall(task.config, SimpleNamespace(**{**settings, FACTS: None, "problem_type": None}))


def test_figures_are_those_of_the_labels_that_are_given(task):
    answers = task.answers.answer(gives([[0.1, 0.9, 0.9], [0.1, 0.9, 0.1], [0.9, 0.1, 0.1]]), ROWS)
    metrics = task.answers.metrics(answers, ROWS)
    assert metrics["f1_micro"] == pytest.approx(100 * 2 * 3 / (4 + 3))
    assert metrics["f1_macro"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert metrics["subset_accuracy"] == pytest.approx(200 / 3)
    assert metrics["loss"] == pytest.approx(-np.log([0.9] * 8 + [0.1]).mean(), rel=1e-5)
    assert task.answers.right(answers, ROWS).tolist() == [True, False, True]
    short = task.answers.table(answers, ROWS)["short"]
    assert short == {
        "precision": 50.0,
        "recall": 100.0,
        "f1": pytest.approx(200 / 3),
        "rows": 1.0,
        "wrong": 1.0,
        "missed": 0.0,
    }


def test_two_models_agree_by_the_labels_that_both_give(task):
    own = task.answers.answer(gives([[0.1, 0.9, 0.9], [0.1, 0.1, 0.1]]), ROWS[:2])
    other = task.answers.answer(gives([[0.1, 0.9, 0.1], [0.1, 0.1, 0.1]]), ROWS[:2])
    assert task.answers.agreement(own, own) == 1.0
    assert task.answers.agreement(own, other) == pytest.approx(2 / 3)
    assert task.answers.agreement(own[1:], other[1:]) == 1.0, "both give none"


def test_a_student_imitates_each_label_of_its_teacher(task):
    torch.manual_seed(0)
    own, teacher, t = torch.randn(4, 3), torch.randn(4, 3), 3.0
    p, q = (teacher / t).sigmoid(), (own / t).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = task.imitation({"logits": own}, {"logits": teacher}, t)
    torch.testing.assert_close(found, t**2 * kl.mean(dim=1).sum())
    assert abs(float(task.imitation({"logits": own}, {"logits": own}, t))) < 1e-6


def test_what_is_served_names_every_label(task):
    answers = task.answers.answer(gives([[0.1, 0.9, 0.9], [0.1, 0.1, 0.1]]), ROWS[:2])
    tensors = task.answers.tensors(answers)
    assert [json.loads(text) for text in tensors["LABELS"][:, 0]] == [["short", "warm"], []]
    np.testing.assert_allclose(tensors["SCORES"], [[0.1, 0.9, 0.9], [0.1, 0.1, 0.1]], atol=1e-6)
    assert [task.answers.line(answer) for answer in answers] == ["short 0.9000, warm 0.9000", "-"]
    assert json.loads(json.dumps(task.answers.record(answers[0], ROWS[0])))["prediction"] == ["short", "warm"]


def test_fasttext_files_with_one_label_several_and_none_in_a_line_are_read(tmp_path):
    from engine.config import load_recipe
    from engine.data.sources import SourceConfig, SourceRows

    (tmp_path / "rows.ft").write_text("__label__warm a\n__label__warm __label__short b\nno label at all\n")
    config = multi_label.Config(type="multi_label")
    rows = SourceRows(SourceConfig(path="rows.ft"), load_recipe(write_recipe(tmp_path)), config.columns)
    assert [config.classes_of(row) for row in rows] == [["warm"], ["warm", "short"], []]
