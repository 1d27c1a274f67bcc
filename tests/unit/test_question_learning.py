"""How finding answers is learnt: examples, loss, imitation, what is refused, and what the command line sees in the data."""

import json

import numpy as np
import pytest
import torch

from engine.config import load_recipe
from engine.data.sources import PlacedRow
from engine.data.splits import load_splits
from engine.errors import UserError
from engine.tasks import question_answering
from launch.check import check_recipe
from launch.new import new_recipe
from launch.recipe import load_stages
from tests.recipes import finetune_section, write_model, write_questions, write_recipe, write_rows
from tests.unit.questions import CONTEXT, LONG, NONE, ROWS, qa_task, tiny_model


@pytest.fixture
def task(tmp_path):
    return qa_task(tmp_path)


@pytest.fixture
def or_none(tmp_path):
    return qa_task(tmp_path, [*ROWS, NONE])


# How it is learnt


def test_the_most_frequent_answer_is_learnt_and_its_tokens_are_those_of_its_characters(task):
    answers = [
        {"text": "dull", "answer_start": 36},
        {"text": "good film", "answer_start": 19},
        {"text": "good film", "answer_start": 19},
    ]
    (learnt,) = task.encode([{**ROWS[0], "answers": answers}])
    first, last = learnt["label"]
    assert task.tokenizer.convert_ids_to_tokens(learnt["input_ids"][first : last + 1]) == ["good", "film"]
    assert learnt["context"][0] <= first and last < learnt["context"][1]


def test_windows_without_the_answer_learn_that_there_is_none(tmp_path):
    task = qa_task(tmp_path, max_length=24, stride=6)
    examples = task.encode([{"question": "a film", "context": LONG, "answers": ["good film"]}])
    words = [
        task.tokenizer.convert_ids_to_tokens(each["input_ids"][each["label"][0] : each["label"][1] + 1]) for each in examples
    ]
    assert words.count(["good", "film"]) >= 1 and words.count(["[CLS]"]) == len(words) - words.count(["good", "film"]) > 2


def by_hand(model, task, batch, place):
    """Cross entropy of a window, over its context and the first token, in NumPy."""
    total = 0.0
    output = model(**{name: batch[name][place : place + 1] for name in task.inputs})
    first, end = batch["context"][place].tolist()
    for number, logits in enumerate((output.start_logits, output.end_logits)):
        logits = logits[0].detach().double().numpy()
        allowed = [0, *range(first, end)]
        total += np.log(np.exp(logits[allowed]).sum()) - logits[int(batch["labels"][place, number])]
    return total / 2


def test_the_loss_is_the_mean_of_two_cross_entropies_over_context_and_no_answer_and_rows_without_truth_do_not_count(or_none):
    model = tiny_model(or_none)
    examples = or_none.encode([*ROWS, NONE, {"question": "a", "context": CONTEXT}])
    batch = or_none.collate(examples)
    total, count = or_none.loss(model, batch)
    assert count == or_none.count(batch) == 3
    torch.testing.assert_close(
        float(total), sum(by_hand(model, or_none, batch, place) for place in range(3)), rtol=1e-4, atol=1e-4
    )
    alone = [float(or_none.loss(model, or_none.collate([example]))[0]) for example in examples]
    torch.testing.assert_close(float(total), sum(alone), rtol=1e-4, atol=1e-4)
    assert alone[3] == 0.0


def test_the_loss_is_that_of_transformers_where_nothing_but_context_scores(task):
    model, batch = tiny_model(task), task.collate(task.encode(ROWS[:1]))
    first, end = batch["context"][0].tolist()
    context = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    context[first:end] = context[0] = True
    handle = model.qa_outputs.register_forward_hook(lambda *given: given[2].masked_fill(~context[None, :, None], -1e4))
    labels = {"start_positions": batch["labels"][:, 0], "end_positions": batch["labels"][:, 1]}
    theirs = model(**{name: batch[name] for name in task.inputs}, **labels).loss
    total, count = task.loss(model, batch)
    handle.remove()
    torch.testing.assert_close(total / count, theirs)


def test_a_student_that_is_its_teacher_imitates_it_perfectly_and_padding_does_not_enter(or_none):
    model, examples = tiny_model(or_none), or_none.encode([*ROWS, NONE])

    def lesson(chosen, shift=0.0):
        batch = or_none.collate(chosen)
        outputs = or_none.named(or_none.forward(model, batch))
        outputs = {name: value + shift * value.detach().cos() for name, value in outputs.items()}
        return or_none.lesson(outputs, batch, 2.0)

    same = lesson(examples)
    assert float(or_none.imitation(same, same, 2.0)) == pytest.approx(0.0, abs=1e-5)
    together = or_none.imitation(lesson(examples, 0.5), same, 2.0)
    alone = sum(float(or_none.imitation(lesson([each], 0.5), lesson([each]), 2.0)) for each in examples)
    assert float(together) > 0.01 and float(together) == pytest.approx(alone, rel=1e-4)
    together.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_a_kept_lesson_is_that_of_the_batch_whatever_the_lengths(or_none):
    from engine.evaluate import lessons_of

    model, examples = tiny_model(or_none), or_none.encode([*ROWS, NONE])
    found = lessons_of(model, or_none, examples, 2.0)
    batch = or_none.collate(examples)
    whole = or_none.lesson(or_none.named(or_none.forward(model, batch)), batch, 2.0)["log_probabilities"].detach().numpy()
    for row, example_ in enumerate(examples):
        size = len(example_["input_ids"])
        assert found[row]["log_probabilities"].shape == (size, 2)
        np.testing.assert_allclose(found[row]["log_probabilities"], whole[row, :size], atol=1e-5)
        assert not whole[row, size:].any()


def test_what_a_plan_measures_uses_both_scores(task):
    task.made_up_loss(tiny_model(task), 2, 8).backward()


# What is refused


def placed(row):
    return PlacedRow({"id": "q9", **row}, "rows.jsonl", 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": [{"text": "great film", "answer_start": 19}]}, "the answer 'great film' does not stand at 19"),
        ({"answers": ["a"]}, "stands in its context more than once"),
        ({"answers": [3]}, "holds an answer without a text"),
        ({"answers": []}, "has no answer: leave it out, or let questions have none (task.unanswerable: true)"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_learnt_are_named_with_file_line_and_question(row, message):
    config = question_answering.Config(type="question_answering", unanswerable=False)
    with pytest.raises(UserError) as error:
        config.check_rows([placed({**ROWS[0], **row})], complete=True)
    assert str(error.value).startswith("rows.jsonl:3: question q9: ") and "\n" not in str(error.value)
    assert message[:30] in str(error.value)


def test_a_question_without_an_answer_is_refused_where_training_has_none_such(task):
    with pytest.raises(UserError, match=r"^rows.jsonl:3: question q9: has no answer, and all training rows have one"):
        task.encode([placed(NONE)])


def test_answers_beside_their_places_are_learnt_there_counted_and_said(tmp_path):
    rows = [{**ROWS[0], "answers": [{"text": "good film", "answer_start": 17}]}, ROWS[1]]
    task = qa_task(tmp_path, rows)
    assert task.encode(rows)[0]["label"] == qa_task(tmp_path).encode(ROWS)[0]["label"]
    assert "1 answers stood up to a few characters beside answer_start: found there" in task.notes


def test_training_rows_without_any_answer_teach_nothing(tmp_path):
    with pytest.raises(UserError, match="column 'answers' holds no answer: there is nothing to learn"):
        qa_task(tmp_path, [NONE])


@pytest.mark.parametrize(
    ("length", "section", "message"),
    [(16, {"stride": 12}, "windows of 16 tokens cannot share 12: stride must be below 12"), (4, {}, "raise max_length")],
)
def test_windows_that_hold_nothing_are_refused(tmp_path, length, section, message):
    with pytest.raises(UserError, match=f"task.type=question_answering: .*{message}"):
        qa_task(tmp_path, max_length=length, **section)


# What the command line sees in the data


@pytest.mark.parametrize("form", ["squad", "hub", "lines"])
def test_a_recipe_for_questions_is_written_from_files_of_all_forms(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    name, columns = "rows.jsonl", []
    if form == "squad":
        name = write_questions(tmp_path / "dev-v2.0.json", 40).name
    elif form == "hub":
        answers = {"text": ["good film"], "answer_start": [19]}
        write_rows(tmp_path / name, [{"id": str(n), "title": "t", **ROWS[0], "answers": answers} for n in range(30)])
    else:
        columns = ["question=asked", "answers=gold"]
        write_rows(tmp_path / name, [{"passage": CONTEXT, "asked": f"film {n}", "gold": "good film"} for n in range(30)])
    path, seen = new_recipe(name, None, None, "model", columns)
    recipe = load_recipe(path)
    config = load_stages(recipe)[0].config
    assert config.task.type == "question_answering" and config.data.train.path == name
    assert [config.task.question, config.task.context] == (["asked", "passage"] if form == "lines" else ["question", "context"])
    assert any("questions have none" in fact if form == "squad" else "they stand in the contexts" in fact for fact in seen)


def check(tmp_path, rows, **task):
    """Checks a recipe that learns from a file of SQuAD; returns what is said of the data."""
    paragraphs = [{"context": row["context"], "qas": [{"id": f"q{n}", **row}]} for n, row in enumerate(rows)]
    (tmp_path / "rows.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    section = finetune_section(task={"type": "question_answering", **task}, data={"train": "rows.json", "validation": "25%"})
    recipe, said = load_recipe(write_recipe(tmp_path, {"teacher": {"finetune": section}})), []
    check_recipe(recipe, load_stages(recipe), say=said.append)
    return said


def test_check_says_how_many_answers_were_moved_and_names_the_question_whose_answer_is_not_there(tmp_path):
    (said,) = check(tmp_path, [{**ROWS[0], "answers": [{"text": "good film", "answer_start": 17}]}, ROWS[1]])
    assert said.endswith("SQuAD's JSON, utf-8; 1 answers stood a few characters beside answer_start: moved there")
    with pytest.raises(UserError, match=r"rows.json:1: question q1: the answer 'warm' does not stand at 3"):
        check(tmp_path, [ROWS[0], {**ROWS[1], "answers": [{"text": "warm", "answer_start": 3}]}])


def test_check_refuses_windows_that_share_more_than_they_hold(tmp_path):
    with pytest.raises(UserError, match=r"task.stride=40: windows of max_length=32 tokens cannot share as many"):
        check(tmp_path, ROWS, stride=40)


def test_answers_of_another_kind_are_not_taken_for_parts_of_the_context(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"question": f"film {n}", "context": CONTEXT, "answer": "yes"} for n in range(30)])
    with pytest.raises(UserError, match="no columns for the task question_answering"):
        new_recipe("rows.jsonl", None, "question_answering", "model", [])


def test_questions_on_one_context_are_never_on_both_sides_of_a_share(tmp_path):
    rows = [{**ROWS[0], "question": f"film {n}", "context": f"{CONTEXT} {n % 20}"} for n in range(60)]
    write_rows(tmp_path / "rows.jsonl", rows)
    section = finetune_section(task={"type": "question_answering"}, data={"train": "rows.jsonl", "validation": "30%"})
    recipe = load_recipe(write_recipe(tmp_path, {"teacher": {"finetune": section}}))
    config = load_stages(recipe)[0].config
    splits = load_splits(config.data, recipe, config.task.split_by, config.task.columns)
    contexts = [{row["context"] for row in splits[name]} for name in ("train", "validation")]
    assert all(contexts) and not contexts[0] & contexts[1]
