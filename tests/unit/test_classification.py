"""The classification task and its losses."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.answers.classification import f1_macro
from engine.data.sentences import sentence_starts, sentences_of
from engine.errors import UserError
from engine.evaluate import Alone, evaluate, share_of_answers
from engine.tasks import classification
from export.compress.distill import layers_to_keep, matched, token_mse
from tests.recipes import run_here, write_recipe, write_rows
from tests.unit.models import classification_task, tiny_classifier

ROWS = [
    {"text": "a good film", "label": "1"},
    {"text": "bad", "label": "0"},
    {"text": "the plot was very very dull", "label": "0"},
]
CONFIG = classification.Config(type="classification")


@pytest.fixture
def task(tmp_path):
    return classification_task(tmp_path)


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
        classification.Task.learn(CONFIG, ROWS[1:])


def test_names_replace_the_labels_of_the_file():
    config = classification.Config(type="classification", names={0: "negative", 1: "positive"})
    assert classification.Task.learn(config, ROWS) == {"labels": ["negative", "positive"]}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_counts_every_example_once_on_any_number_of_ranks(task, ranks, monkeypatch):
    monkeypatch.setattr("engine.evaluate.EVALUATION_BATCH", 2)
    model = tiny_classifier()
    rows = [{**row, "text": f"{row['text']} {word}"} for row in ROWS for word in ("film", "plot", "a very long story")]

    class Rank(Alone):
        def __init__(self, rank):
            self.rank, self.processes = rank, ranks

        def gather(self, value):
            return [share_of_answers(model, task, rows, Rank(rank)) for rank in range(ranks)]

    metrics, answers = evaluate(model, task, rows, Rank(0))
    alone, expected = evaluate(model, task, rows)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]
    np.testing.assert_allclose([a["score"] for a in answers], [a["score"] for a in expected], atol=1e-6)
    assert metrics["examples"] == alone["examples"] == 9


def test_all_ranks_make_the_same_number_of_forward_passes_though_one_has_less_to_do(task, monkeypatch):
    """A sharded model needs every rank in each pass; here two threads stand for two ranks."""
    import threading

    monkeypatch.setattr("engine.evaluate.EVALUATION_BATCH", 1)
    together, said = threading.Barrier(2, timeout=20), [0.0, 0.0]
    passes = [0, 0]

    class Rank(Alone):
        def __init__(self, rank):
            self.rank, self.processes = rank, 2

        def sum(self, *values):
            said[self.rank] = values[0]
            together.wait()
            total = sum(said)
            together.wait()
            return [total]

    def work(rank):
        model = tiny_classifier()
        model.register_forward_hook(lambda *_: passes.__setitem__(rank, passes[rank] + 1))
        share_of_answers(model, task, rows, Rank(rank))

    rows = [*ROWS, *ROWS[:2]]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert passes == [3, 3], "5 rows, one a pass"


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_torchmetrics_and_of_torch(task, seed):
    from torchmetrics.functional.classification import multiclass_f1_score

    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    expected = multiclass_f1_score(torch.from_numpy(predicted), torch.from_numpy(truth), num_classes=6, average="macro")
    assert f1_macro(predicted, truth, 6) == pytest.approx(float(expected), abs=1e-6)
    logits = rng.normal(size=(3, 2)).astype(np.float32)
    answers = task.answers.answer(lambda graph, arrays: {"logits": logits}, ROWS)
    loss = functional.cross_entropy(torch.from_numpy(logits), torch.tensor([1, 0, 0]))
    assert task.answers.metrics(answers, ROWS)["loss"] == pytest.approx(float(loss), rel=1e-5)


def distillation(task, student, teacher, labels, temperature, soft, hard):
    outputs, batch = {"logits": student}, {"labels": labels}
    imitation = task.imitation(outputs, {"logits": teacher}, temperature)
    return soft * imitation + hard * task.loss_of(outputs, batch)[0]


def test_soft_targets_follow_hinton_and_unlabelled_rows_have_no_hard_term(task):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([0, 2, -100, 1])
    t = 3.0
    target = (teacher / t).softmax(1)
    kl = (target * (target.log() - (student / t).log_softmax(1))).sum()
    ce = functional.cross_entropy(student[[0, 1, 3]], labels[[0, 1, 3]], reduction="sum")
    torch.testing.assert_close(distillation(task, student, teacher, labels, t, 0.7, 0.3), 0.7 * t**2 * kl + 0.3 * ce)


def test_a_perfect_student_has_no_soft_loss(task):
    logits = torch.randn(4, 3)
    assert abs(float(distillation(task, logits, logits, torch.full((4,), -100), 2.0, 1.0, 1.0))) < 1e-5


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
    text = "One. Two!\nThree 你好。再见。"
    starts = sentence_starts(text)
    assert [text[place:] for place in starts] == ["Two!\nThree 你好。再见。", "Three 你好。再见。", "再见。"]
