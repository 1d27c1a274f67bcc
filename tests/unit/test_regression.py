"""The regression task: answers in the unit of the data, its losses, what it refuses."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.answers import RowError
from engine.errors import UserError
from engine.tasks import FACTS, regression
from tests.recipes import finetune_section, run_here, write_recipe, write_rows
from tests.unit.models import INPUTS, tiny_classifier, tiny_tokenizer

ROWS = [
    {"text": "a good film", "label": 4.5},
    {"text": "bad", "label": "1"},
    {"text": "the plot was very very dull", "label": 2},
]


def regression_task(directory, rows=ROWS, **section):
    config = regression.Config(type="regression", **section)
    return regression.Task(config, regression.Task.learn(config, rows), tiny_tokenizer(directory), 16)


@pytest.fixture
def task(tmp_path):
    return regression_task(tmp_path)


def gives(values):
    """A model that gives these standardised numbers."""
    return lambda graph, arrays: {"logits": np.array(values, dtype=np.float32)}


def test_the_loss_is_hugging_faces_loss_of_the_standardised_numbers_times_the_rows(task):
    model = tiny_classifier(num_labels=1, problem_type="regression")
    batch = task.collate(task.encode(ROWS))
    labels = torch.tensor([4.5, 1.0, 2.0])
    labels = (labels - labels.mean()) / labels.std(unbiased=False)
    theirs = model(**{key: batch[key] for key in INPUTS}, labels=labels)
    total, count = task.loss(model, batch)
    assert count == task.count(batch) == 3
    torch.testing.assert_close(total / count, theirs.loss)


def test_huber_follows_torch_and_unlabelled_rows_enter_neither_sum_nor_count(tmp_path):
    task = regression_task(tmp_path, loss="huber", delta=0.5)
    batch = task.collate(task.encode([*ROWS, {"text": "a film"}]))
    own = torch.randn(4, 1)
    total, count = task.loss_of({"logits": own}, batch)
    expected = functional.huber_loss(own[:3], batch["labels"][:3], reduction="sum", delta=0.5)
    assert count == task.count(batch) == 3
    torch.testing.assert_close(total, expected)


def test_several_numbers_of_a_row_count_as_one_row(tmp_path):
    rows = [{"text": "a", "x": 1, "y": 10}, {"text": "film", "x": 3, "y": 40}]
    task = regression_task(tmp_path, rows, label=["x", "y"])
    batch = task.collate(task.encode(rows))
    total, count = task.loss_of({"logits": torch.zeros(2, 2)}, batch)
    assert (float(total), float(count)) == (2.0, 2.0), "standardised numbers have a mean square of 1"


def test_answers_are_in_the_unit_of_the_data(task):
    answers = task.answers.answer(gives([[0.0], [-1.0], [2.0]]), ROWS)
    mean, sd = 2.5, np.std([4.5, 1, 2])
    np.testing.assert_allclose([answer["values"]["label"] for answer in answers], [mean, mean - sd, mean + 2 * sd], rtol=1e-6)


def test_no_answer_lies_beyond_the_bounds(tmp_path):
    bounded = regression_task(tmp_path, bounds=[0, 5]).answers
    given = bounded.answer(gives([[-9.0], [9.0], [0.0]]), ROWS)
    assert [answer["values"]["label"] for answer in given] == [0.0, 5.0, pytest.approx(2.5)]
    with pytest.raises(ValueError, match="5 is not below 0: write the smaller one first"):
        regression_task(tmp_path, bounds=[5, 0])


def test_a_model_that_gives_the_targets_is_perfect(tmp_path):
    rows = [{"text": "a", "x": 1, "y": -10}, {"text": "film", "x": 3, "y": 40}, {"text": "bad", "x": 2, "y": 9}]
    task = regression_task(tmp_path, rows, label=["x", "y"])
    answers = task.answers.answer(gives([example["label"] for example in task.encode(rows)]), rows)
    metrics = task.answers.metrics(answers, rows)
    assert metrics["examples"] == 3
    for name, best in (("pearson", 100), ("spearman", 100), ("rmse", 0), ("mae", 0)):
        for key in (name, f"{name}_x", f"{name}_y"):
            assert metrics[key] == pytest.approx(best, abs=1e-4)


def test_errors_are_those_of_the_numbers_and_the_loss_that_of_training(task):
    z = np.array([[0.3], [-1.0], [0.2]], dtype=np.float32)
    metrics = task.answers.metrics(task.answers.answer(gives(z), ROWS), ROWS)
    off = 2.5 + np.std([4.5, 1, 2]) * z[:, 0] - [4.5, 1, 2]
    assert metrics["rmse"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.abs(off).mean(), rel=1e-5)
    total, count = task.loss_of({"logits": torch.from_numpy(z)}, task.collate(task.encode(ROWS)))
    assert metrics["loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_equal_predictions_for_all_rows_are_judged_without_nan(task):
    metrics = task.answers.metrics(task.answers.answer(gives([[0.1]] * 3), ROWS), ROWS)
    assert metrics["pearson"] == metrics["spearman"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values())


def test_two_models_agree_where_all_their_numbers_are_nearly_equal(task):
    own = task.answers.answer(gives([[0.0], [1.0], [2.0]]), ROWS)
    assert task.answers.agreement(own, own) == 1.0
    assert task.answers.agreement(own, task.answers.answer(gives([[0.2], [1.3], [2.0]]), ROWS)) == pytest.approx(2 / 3)


def test_a_student_imitates_the_numbers_of_its_teacher(task):
    own, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert float(task.imitation({"logits": own}, {"logits": teacher}, 3.0)) == 5.0
    assert float(task.imitation({"logits": own}, {"logits": own}, 3.0)) == 0.0


def test_mean_and_deviation_come_back_from_a_models_configuration(task):
    settings = task.settings()
    assert settings[FACTS]["mean"] == [2.5]
    assert regression.Task.recall(task.config, SimpleNamespace(**settings)) == task.facts


def test_somebody_elses_regression_model_is_taken_as_it_is_and_a_classifier_is_refused():
    config = regression.Config(type="regression")
    model = SimpleNamespace(num_labels=1, problem_type="regression")
    assert regression.Task.recall(config, model) == {"mean": [0.0], "sd": [1.0]}
    with pytest.raises(UserError, match="none of regression"):
        regression.Task.recall(config, SimpleNamespace(num_labels=1))
    with pytest.raises(UserError, match=r"gives 2 numbers, and task\.label names 1"):
        regression.Task.recall(config, SimpleNamespace(num_labels=2))


@pytest.mark.parametrize("value", ["abc", "3,5", True, [1.0], {"a": 1}, "inf", float("inf")])
def test_what_is_no_number_is_refused_with_file_and_line(tmp_path, value):
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(task={"type": "regression"})}})
    rows = [{"text": f"a film {n}", "label": float(n)} for n in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "bad", "label": value}])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:9: column 'label' holds .* takes finite numbers"):
        run_here(recipe, "teacher", tmp_path / "runs")
    assert not (tmp_path / "runs" / "tiny" / "teacher").exists()


@pytest.mark.parametrize("value", [float("nan"), "nan", None, ""])
def test_a_number_that_is_missing_is_refused_with_file_and_line(tmp_path, value):
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(task={"type": "regression"})}})
    rows = [{"text": f"a film {n}", "label": float(n)} for n in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "bad", "label": value}])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:9: column 'label' is empty"):
        run_here(recipe, "teacher", tmp_path / "runs")


def test_a_column_with_one_number_is_refused(tmp_path):
    with pytest.raises(UserError, match="only the number 3"):
        regression_task(tmp_path, [{"text": "a", "label": 3}, {"text": "b", "label": 3.0}])


def test_the_answering_half_names_the_column_of_a_row_that_it_cannot_judge(task):
    with pytest.raises(RowError, match="column 'label' holds 'x'"):
        task.answers.truth({"text": "a", "label": "x"})


def test_predictions_stand_beside_the_truth_as_json(task):
    (answer,) = task.answers.answer(gives([[0.0]]), ROWS[:1])
    record = json.loads(json.dumps(task.answers.record(answer, ROWS[0])))
    assert (record["label"], record["prediction"]) == (4.5, 2.5)
    assert task.answers.tensors([answer])["VALUES"].tolist() == [[2.5]]
    assert task.answers.line(answer) == "2.5"
