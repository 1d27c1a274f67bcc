"""Classes that are not equally large: weights, focal loss, balanced sampling, and the figures that choose the best weights."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from engine.data.rows import LabelledBatches
from engine.errors import UserError
from tests.recipes import finetune_section, ragged_rows, run_here, train_section, write_recipe, write_rows
from tests.unit.models import classification_task

LABELS = torch.tensor([0, 1, 1, 2, 1, -100])
ROWS = [{"text": "a film", **({} if label < 0 else {"label": str(label)})} for label in LABELS.tolist()]


def started(directory, **section):
    """(the task, the batch of ROWS) as training has them."""
    task = classification_task(directory, labels=("0", "1", "2"), **section)
    examples = task.encode(ROWS)
    task.begin(examples)
    return task, task.collate(examples)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [0, 3, 5], [1, 3]])
def test_weights_of_classes_enter_sum_and_count_so_that_the_mean_is_torchs_weighted_mean(tmp_path, rows):
    task, batch = started(tmp_path, class_weights={0: 3, "2": 0.5})
    batch, logits = {key: value[rows] for key, value in batch.items()}, torch.randn(len(rows), 3)
    total, count = task.loss_of({"logits": logits}, batch)
    expected = functional.cross_entropy(logits, LABELS[rows], weight=torch.tensor([3.0, 1.0, 0.5]))
    torch.testing.assert_close(total / count, expected)
    assert float(count) == pytest.approx(task.count(batch))


def test_weights_of_ones_own_count_1_on_average_so_that_they_keep_their_place_beside_soft_targets(tmp_path):
    _, batch = started(tmp_path, class_weights={0: 30, "2": 5})
    assert float(batch["weights"].sum()) == pytest.approx(5.0)
    assert float(batch["weights"][0] / batch["weights"][1]) == pytest.approx(30)


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_micro_batches_of_weighted_rows_add_up_to_the_whole(tmp_path, loss):
    task, batch = started(tmp_path, class_weights="balanced", loss=loss)
    logits = torch.randn(6, 3)
    whole = task.loss_of({"logits": logits}, batch)
    parts = [
        task.loss_of({"logits": logits[rows]}, {key: value[rows] for key, value in batch.items()})
        for rows in ([0, 3], [1, 2, 4, 5])
    ]
    for index in (0, 1):
        torch.testing.assert_close(parts[0][index] + parts[1][index], whole[index])


def test_balanced_weights_make_all_classes_count_the_same_and_rows_count_1_on_average(tmp_path):
    _, batch = started(tmp_path, class_weights="balanced")
    sums = [float(batch["weights"][label == LABELS].sum()) for label in range(3)]
    assert sums == pytest.approx([5 / 3] * 3)
    assert float(batch["weights"][-1]) == 0.0, "an unlabelled row has no weight"


def test_the_focal_loss_is_that_of_the_paper(tmp_path):
    task, batch = started(tmp_path, loss="focal", gamma=1.5)
    logits = torch.randn(6, 3)
    p = logits.softmax(1)[range(5), LABELS[:5]]
    total, count = task.loss_of({"logits": logits}, batch)
    torch.testing.assert_close(total, (-((1 - p) ** 1.5) * p.log()).sum())
    assert float(count) == 5


@given(st.floats(0, 5), st.floats(-60, 60))
def test_the_focal_loss_has_a_finite_gradient_however_sure_the_model_is(gamma, logit):
    from engine.tasks.classification import Config, Task

    task = Task.__new__(Task)
    task.config = Config(type="classification", loss="focal", gamma=gamma)
    logits = torch.tensor([[logit, 0.0]], requires_grad=True)
    total, _ = task.loss_of({"logits": logits}, {"labels": torch.tensor([0])})
    total.backward()
    assert torch.isfinite(total) and torch.isfinite(logits.grad).all()
    if gamma == 0:
        torch.testing.assert_close(total, functional.cross_entropy(logits, torch.tensor([0])))


def test_without_weights_the_batch_and_the_loss_are_the_plain_ones(tmp_path):
    task, batch = started(tmp_path)
    assert "weights" not in batch
    assert task.count(batch) == 5
    logits = torch.randn(6, 3)
    assert task.loss_of({"logits": logits}, batch)[0] == functional.cross_entropy(logits, LABELS, reduction="sum")


def test_balanced_sampling_gives_every_class_the_same_number_of_rows_on_any_number_of_ranks(tmp_path):
    task = classification_task(tmp_path, sampling="balanced")
    examples = task.encode([{"text": "a film", "label": str(int(n % 10 == 0))} for n in range(80)])
    batches = LabelledBatches(examples, task, 8, seed=1)
    assert batches.steps_per_epoch == 10
    drawn = [part["labels"] for step in range(10) for rank in (0, 1) for part in batches.at(step, rank, 2, 2)]
    assert np.bincount(torch.cat(drawn)).tolist() == [40, 40]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"class_weights": {"3": 1}}, "task.class_weights: '3' is not among the labels"),
        ({"positive": "yes"}, "task.positive: 'yes' is not among the labels"),
        ({"metric": "f1"}, "task.metric=f1 is of two classes, and there are 3: take f1_macro"),
    ],
)
def test_keys_that_do_not_go_with_the_labels_are_refused(tmp_path, section, said):
    with pytest.raises(UserError, match=said):
        classification_task(tmp_path, labels=("0", "1", "2"), **section)


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": -1}, {"a": float("inf")}, "even"])
def test_weights_that_weigh_nothing_are_refused(weights):
    from engine.tasks.classification import Config

    with pytest.raises(ValueError, match="class_weights"):
        Config(type="classification", class_weights=weights)


@pytest.mark.parametrize(("positive", "expected"), [(None, 50.0), ("0", 75.0)])
def test_f1_is_that_of_the_positive_class(tmp_path, positive, expected):
    task = classification_task(tmp_path, positive=positive, metric="f1")
    truth, given = ["0", "0", "0", "1", "1", "0"], ["0", "0", "0", "1", "0", "1"]
    logits = np.eye(2, dtype=np.float32)[[int(label) for label in given]]
    rows = [{"text": "a", "label": label} for label in truth]
    metrics = task.answers.metrics(task.answers.answer(lambda graph, arrays: {"logits": logits}, rows), rows)
    assert metrics["f1"] == pytest.approx(expected)
    assert task.answers.metric.name == "f1"


def test_the_chosen_figure_chooses_the_weights_and_every_class_has_its_own_figures(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [row for number, row in enumerate(ragged_rows(120)) if row["label"] or number % 4])
    task = {"type": "classification", "metric": "matthews", "class_weights": "balanced", "sampling": "balanced", "loss": "focal"}
    section = finetune_section(task=task, train=train_section(steps=8, learning_rate=3e-3))
    run_here(write_recipe(tmp_path, {"teacher": {"finetune": section}}), "teacher", tmp_path / "runs")
    output = tmp_path / "runs" / "tiny" / "teacher"
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["validation"]["matthews"] for line in history if "validation" in line and line["step"]}
    record = json.loads((output / "stage.json").read_text())
    assert record["metric"]["name"] == "matthews"
    assert judged[record["best_step"]] == max(judged.values())
    table = json.loads((output / "per_class.json").read_text())
    assert set(table) == {"validation", "test"}
    assert sum(row["rows"] for row in table["test"].values()) == record["metrics"]["test"]["examples"]
