"""The classification task and its losses."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.errors import UserError
from engine.evaluate import Alone, classifier_logits, evaluate_classifier
from engine.tasks import ClassificationConfig
from engine.tasks.classification import Classification
from export.compress.distill import classification_loss, layers_to_keep, matched, sentences_of, token_mse
from tests.recipes import run_here, write_recipe, write_rows
from tests.unit.models import tiny_classifier, tiny_tokenizer

ROWS = [
    {"text": "a good film", "label": "1"},
    {"text": "bad", "label": "0"},
    {"text": "the plot was very very dull", "label": "0"},
]
CONFIG = ClassificationConfig(type="classification")


@pytest.fixture
def task(tmp_path):
    return Classification(CONFIG, ["0", "1"], tiny_tokenizer(tmp_path), 16)


def test_the_loss_is_hugging_faces_loss_times_the_rows(task):
    model = tiny_classifier()
    batch = task.collate(task.encode(ROWS))
    theirs = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids", "labels")})
    total, count = task.loss(model, batch)
    assert count == 3
    torch.testing.assert_close(total / count, theirs.loss)


def test_micro_batches_of_ragged_rows_add_up_to_the_loss_and_gradient_of_the_whole(task):
    rows = [{"text": " ".join(["film"] * n), "label": str(n % 2)} for n in range(1, 9)] + [{"text": "a"}]
    examples = task.encode(rows)
    gradients = []
    for size in (9, 1, 4):
        model = tiny_classifier()
        count = 8
        for start in range(0, 9, size):
            total, _ = task.loss(model, task.collate(examples[start : start + size]))
            (total / count).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)


def test_over_long_rows_are_cut_and_counted(task):
    examples = task.encode([{"text": " ".join(["film"] * 40), "label": "1"}, *ROWS])
    assert len(examples[0]["input_ids"]) == 16
    assert task.truncated == 1


def test_an_unseen_label_is_named(task):
    with pytest.raises(UserError, match="label '2' is not among the training labels"):
        task.encode([{"text": "a", "label": "2"}])


def test_an_unseen_label_of_a_file_is_named_with_its_line(tmp_path):
    recipe = write_recipe(tmp_path)
    path = write_rows(tmp_path / "validation.jsonl", [*ROWS, {"text": "a", "label": "2"}])
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:4: label '2' is not among the training labels"):
        run_here(recipe, "teacher", tmp_path / "runs", "teacher.data.validation=validation.jsonl")


def test_one_label_alone_is_refused():
    with pytest.raises(UserError, match="only the label"):
        Classification.find_labels(ROWS[1:], CONFIG)


def test_names_replace_the_labels_of_the_file():
    config = ClassificationConfig(type="classification", names={0: "negative", 1: "positive"})
    assert Classification.find_labels(ROWS, config) == ["negative", "positive"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_counts_every_example_once_on_any_number_of_ranks(task, ranks, monkeypatch):
    monkeypatch.setattr("engine.evaluate.EVALUATION_BATCH", 2)
    model = tiny_classifier()
    examples = task.encode(ROWS * 3)

    class Rank(Alone):
        def __init__(self, rank):
            self.rank, self.processes = rank, ranks

        def gather(self, value):
            return [classifier_logits(model, task, examples, Rank(rank)) for rank in range(ranks)]

    metrics, logits = evaluate_classifier(model, task, examples, Rank(0))
    alone, expected = evaluate_classifier(model, task, examples)
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert metrics["examples"] == alone["examples"] == 9


def test_soft_targets_follow_hinton_and_unlabelled_rows_have_no_hard_term():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([0, 2, -100, 1])
    t = 3.0
    target = (teacher / t).softmax(1)
    kl = (target * (target.log() - (student / t).log_softmax(1))).sum()
    ce = functional.cross_entropy(student[[0, 1, 3]], labels[[0, 1, 3]], reduction="sum")
    torch.testing.assert_close(classification_loss(student, teacher, labels, t, 0.7, 0.3), 0.7 * t**2 * kl + 0.3 * ce)


def test_a_perfect_student_has_no_soft_loss():
    logits = torch.randn(4, 3)
    assert abs(float(classification_loss(logits, logits, torch.full((4,), -100), 2.0, 1.0, 1.0))) < 1e-5


def test_padding_does_not_enter_the_hidden_state_loss():
    own, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    before = token_mse([(own, other)], mask)
    other = other.clone()
    other[0, 3:] = 99
    torch.testing.assert_close(token_mse([(own, other)], mask), before)
    expected = ((own[0, :3] - other[0, :3]) ** 2).mean() + ((own[1] - other[1]) ** 2).mean()
    torch.testing.assert_close(before, expected)


def test_student_layers_are_matched_with_teacher_layers_at_the_same_height():
    assert matched(("a", "b", "c"), (1, 2, 3, 4, 5, 6)) == [("a", 2), ("b", 4), ("c", 6)]


def test_kept_layers_are_spread_or_named():
    assert layers_to_keep(3, 6) == [0, 2, 4]
    assert layers_to_keep([0, 5], 6) == [0, 5]
    with pytest.raises(UserError, match="layers 0 to 5"):
        layers_to_keep(7, 6)
    with pytest.raises(UserError, match="layers 0 to 5"):
        layers_to_keep([6], 6)


def test_reviews_are_cut_into_sentences():
    assert sentences_of("Good.<br /><br />Really? Yes! one") == ["Good.", "Really?", "Yes!", "one"]
