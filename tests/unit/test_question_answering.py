"""The task of finding answers: spans of the context as it was given, windows, "no answer", losses, figures, refusals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.answers import RowError
from engine.answers.question_answering import END, START, best_difference
from engine.data.sources import PlacedRow
from engine.errors import UserError
from engine.tasks import question_answering
from tests.unit.models import tiny_config, tiny_tokenizer

CONTEXT = "the actor was in a good film with a dull plot"
ROWS = [
    {"question": "a film", "context": CONTEXT, "answers": [{"text": "good film", "answer_start": 19}]},
    {"question": "the plot", "context": CONTEXT, "answers": [{"text": "dull plot", "answer_start": 36}]},
]
NONE = {"question": "the scene", "context": "the actor was cold", "answers": []}
LONG = " ".join(["the actor was very very cold but"] * 6 + ["good film"] + ["and the plot was long"] * 6)


def qa_task(directory, rows=ROWS, max_length=32, **section):
    config = question_answering.Config(type="question_answering", **section)
    return question_answering.Task(config, question_answering.Task.learn(config, rows), tiny_tokenizer(directory), max_length)


@pytest.fixture
def task(tmp_path):
    return qa_task(tmp_path)


@pytest.fixture
def or_none(tmp_path):
    return qa_task(tmp_path, [*ROWS, NONE])


def tiny_model(task, **shape):
    from transformers import BertForQuestionAnswering

    torch.manual_seed(0)
    return BertForQuestionAnswering(tiny_config(**task.settings(), initializer_range=0.5, **shape)).eval()


def runs(model, task):
    """A `run` of the model."""

    def run(graph, arrays):
        batch = {name: torch.from_numpy(arrays[name]) for name in task.inputs}
        with torch.no_grad():
            return {
                name: tensor.numpy() for name, tensor in task.graphs[graph].run(model, batch, batch["attention_mask"]).items()
            }

    return run


def likes(task, *pairs, none=0.0, elsewhere=0.0):
    """A `run` that scores tokens as beginning and end by their words: {beginning, end} in pairs with a score."""
    number = task.tokenizer.convert_tokens_to_ids

    def run(graph, arrays):
        ids = arrays["input_ids"]
        start, end = np.full(ids.shape, elsewhere, dtype=np.float32), np.full(ids.shape, elsewhere, dtype=np.float32)
        for first, last, value in pairs:
            start[ids == number(first)], end[ids == number(last)] = value, value
        start[:, 0] = end[:, 0] = none
        return {START: start, END: end}

    return run


# What is answered


def test_the_answer_is_the_part_of_the_context_as_it_was_given(task):
    row = {"question": "a film", "context": "The  ACTOR, was\tin a Good\n film!"}
    (answer,) = task.answers.answer(likes(task, ("good", "film", 9.0)), [row])
    assert (answer["answer"], answer["start"], answer["end"]) == ("Good\n film", 21, 31)
    assert row["context"][21:31] == answer["answer"] and answer["score"] > 0.9
    assert answer["n_best"][0] == {key: answer[key] for key in ("answer", "start", "end", "score")}
    assert len(answer["n_best"]) == 5 and "no_answer" not in answer
    assert json.loads(json.dumps(answer)) == answer


TEXTS = st.text(st.sampled_from("film good the a 北京 e\u0301 👩‍🚀 \U0001d49c .,\u200b\u00a0é\n"), max_size=60)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 2**32 - 1), st.booleans())
@example("", "", 0, False)
@example("good film " * 9, "", 0, True)
@example("", "good film " * 9, 0, True)
def test_every_answer_is_a_part_of_its_context_whatever_the_scores(tmp_path_factory, question, context, seed, may_be_none):
    rows = [*ROWS, NONE] if may_be_none else ROWS
    task = qa_task(tmp_path_factory.mktemp("task"), rows, max_length=16, max_answer=4, n_best=7)
    rng = np.random.default_rng(seed)

    def run(graph, arrays):
        return {name: 5 * rng.standard_normal(arrays["input_ids"].shape).astype(np.float32) for name in (START, END)}

    (answer,) = task.answers.answer(run, [{"question": question, "context": context}])
    assert len(answer["n_best"]) <= 7
    for each in [*answer["n_best"], answer]:
        assert each["answer"] == context[each["start"] : each["end"]]
        assert 0 <= each["score"] <= 1
    assert all(each["answer"].strip() == each["answer"] != "" for each in answer["n_best"])
    shares = [each["score"] for each in answer["n_best"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) + answer.get("no_answer", {"score": 0})["score"] <= 1 + 1e-4
    assert len({(each["start"], each["end"]) for each in answer["n_best"]}) == len(shares)
    assert answer["answer"] or may_be_none or not answer["n_best"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 40))
def test_the_best_spans_are_those_of_brute_force_over_all_windows(tmp_path_factory, seed, longest, words):
    task = qa_task(tmp_path_factory.mktemp("task"), [*ROWS, NONE], max_length=14, stride=3, max_answer=longest, n_best=3)
    rng, seen = np.random.default_rng(seed), {}
    context = " ".join(rng.choice(["film", "plot", "actor", "cold"], words))

    def run(graph, arrays):
        seen.update({name: rng.standard_normal(arrays["input_ids"].shape).astype(np.float32) for name in (START, END)})
        return seen

    row = {"question": "a film", "context": context}
    (answer,) = task.answers.answer(run, [row])
    (encoded,) = task.answers.encode([row])
    found = {}
    for number, window in enumerate(encoded.windows):
        offsets, sequence = window.encoding.offsets, window.encoding.sequence_ids
        for first in range(len(offsets)):
            for last in range(first, min(first + longest, len(offsets))):
                if sequence[first] == sequence[last] == 1:
                    place = (offsets[first][0], offsets[last][1])
                    value = float(seen[START][number, first]) + float(seen[END][number, last])
                    found[place] = max(found.get(place, -np.inf), value)
    none = min(float(seen[START][number, 0]) + float(seen[END][number, 0]) for number in range(len(encoded.windows)))
    whole = sum(np.exp(list(found.values()))) + np.exp(none)
    best = sorted(found, key=found.get, reverse=True)[:3]
    assert [(each["start"], each["end"]) for each in answer["n_best"]] == best
    assert [each["score"] for each in answer["n_best"]] == pytest.approx([np.exp(found[each]) / whole for each in best], abs=1e-6)
    assert answer["no_answer"]["difference"] == pytest.approx(none - found[best[0]], abs=1e-5)


def test_an_answer_never_lies_in_the_question_nor_is_longer_than_allowed_nor_ends_before_it_begins(tmp_path):
    task = qa_task(tmp_path, max_answer=2)
    rows = [
        {"question": "good film", "context": "the plot was dull"},
        {"question": "a", "context": "good plot with film"},
        {"question": "a", "context": "film was good"},
    ]
    for answer in task.answers.answer(likes(task, ("good", "film", 9.0)), rows):
        assert len(answer["answer"].split()) <= 2
        assert answer["answer"] not in ("good film", "good plot with film", "film was good")


def test_a_context_that_needs_windows_gets_the_answer_that_it_gets_in_one(tmp_path):
    short = qa_task(tmp_path / "a", max_length=24, stride=6, max_answer=4)
    long = qa_task(tmp_path / "b", max_length=128, max_answer=4)
    row = {"question": "a film", "context": LONG}
    run = likes(short, ("good", "film", 9.0), ("plot", "plot", 3.0))
    answers = [task.answers.answer(run, [row])[0] for task in (short, long)]
    assert len(short.answers.encode([row])[0].windows) > 4 and len(long.answers.encode([row])[0].windows) == 1
    assert answers[0] == answers[1] and answers[0]["answer"] == "good film"


def test_rows_of_a_batch_get_the_answers_that_they_get_alone(tmp_path):
    task = qa_task(tmp_path, [*ROWS, NONE], max_length=24)
    run = runs(tiny_model(task), task)
    rows = [
        *ROWS,
        {"question": "a", "context": LONG},
        NONE,
        {"question": "", "context": ""},
        {"question": "a " * 60, "context": LONG},
    ]
    together = task.answers.answer(run, rows)
    alone = [task.answers.answer(run, [row])[0] for row in rows]
    places = [[(a["start"], a["end"], a["answer"]) for a in answers] for answers in (together, alone)]
    assert places[0] == places[1]


def test_a_question_that_leaves_no_room_is_cut_and_counted_and_every_window_holds_context(tmp_path):
    task = qa_task(tmp_path, max_length=16)
    row = {"question": "good plot " * 500, "context": LONG, "answers": [{"text": "good film"}]}
    examples = task.encode([row])
    assert task.truncated == 1 and task.windows == len(examples) - 1
    assert all(len(each["input_ids"]) <= 16 and each["context"][1] > each["context"][0] for each in examples)
    assert max(each["context"][0] for each in examples) == task.answers.longest_question + 2


def test_a_context_of_a_hundred_thousand_characters_is_answered(task):
    context = "a dull plot " * 8400 + "a good film"
    (answer,) = task.answers.answer(likes(task, ("good", "film", 20.0)), [{"question": "a film", "context": context}])
    assert (answer["start"], answer["end"]) == (len(context) - 9, len(context))


@pytest.mark.parametrize("row", [{"question": "a film", "context": ""}, {"question": "", "context": "\u200b \n"}])
def test_a_context_without_words_has_no_answer(task, or_none, row):
    for each in (task, or_none):
        (answer,) = each.answers.answer(likes(each, none=-9.0), [row])
        assert (answer["answer"], answer["start"], answer["end"], answer["n_best"]) == ("", 0, 0, [])


def test_marks_belong_to_the_character_before_them(task):
    context = "a film\u0301 with"
    (answer,) = task.answers.answer(likes(task, ("film", "film", 9.0)), [{"question": "a", "context": context}])
    assert answer["answer"] == "film\u0301"


def test_a_row_without_its_inputs_is_named(task):
    with pytest.raises(RowError, match="a row has no 'context': did you mean 'contexts'"):
        task.answers.prepare([{"question": "a", "contexts": "b"}])


# Questions without an answer


def test_no_answer_is_given_where_it_scores_higher_by_the_threshold(or_none):
    answers = or_none.answers
    (answer,) = answers.answer(likes(or_none, ("good", "film", 3.0), none=4.0), [ROWS[0]])
    assert (answer["answer"], answer["start"], answer["end"]) == ("", 0, 0)
    assert answer["no_answer"] == {"score": answer["score"], "difference": 2.0}
    for threshold, expected in ((1.99, ""), (2.0, "good film"), (3.0, "good film")):
        (revised,) = answers.knowing({"threshold": threshold}).revised([answer])
        assert revised["answer"] == expected and revised["n_best"] == answer["n_best"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=9)
)
def test_the_threshold_is_the_best_of_all(rows):
    difference, answered, none = np.array(rows, dtype=np.float64).T

    def total(threshold):
        return np.where(difference > threshold, none, answered).sum()

    chosen = best_difference(difference, answered, none)
    assert total(chosen) == max(total(threshold) for threshold in np.arange(-5, 5, 0.25))
    assert not (np.abs(difference - chosen) < 0.4).any() or chosen in difference + 0.5 or chosen in difference - 0.5


def test_the_threshold_is_chosen_on_validation_rows_and_kept_with_the_model(or_none):
    truths = {"good": ["good"], "great": [], "warm": ["warm"]}
    rows = [{"question": "a", "context": f"{word} film", "answers": answers} for word, answers in truths.items()]
    run = likes(or_none, ("good", "good", 5.0), ("great", "great", 2.0), ("warm", "warm", 4.0), none=4.5)
    given = or_none.answers.answer(run, rows)
    chosen = or_none.answers.choose(given, rows)
    better = or_none.answers.knowing(chosen)
    assert or_none.answers.metrics(given, rows)["f1"] < better.metrics(better.revised(given), rows)["f1"] == 100
    assert chosen == {"threshold": 3.0}, "half-way between 1 and 5"
    or_none.know(chosen)
    kept = SimpleNamespace(**or_none.settings())
    assert question_answering.Task.recall(or_none.config, kept) == {**or_none.facts, "moved": 0}
    surely = question_answering.Config(type="question_answering", unanswerable=False)
    assert question_answering.Task.recall(surely, kept)["may_be_none"] is False


def test_where_every_question_has_an_answer_nothing_is_chosen_and_one_is_always_given(task):
    answers = task.answers.answer(likes(task, none=99.0), ROWS)
    assert task.answers.choose(answers, ROWS) == {} and all(answer["answer"] for answer in answers)


# How it is judged


def test_figures_worst_questions_and_what_is_told_of_them(or_none):
    rows = [*ROWS, NONE, {**NONE, "answers": [{"text": "actor", "answer_start": 4}], "id": "q4"}]
    found = [("a good film", 17, 28), ("", 0, 0), ("", 0, 0), ("actor was", 4, 13)]
    answers = [{"answer": text, "start": start, "end": end, "score": 0.5, "n_best": []} for text, start, end in found]
    metrics = or_none.answers.metrics(answers, rows)
    assert metrics == {"f1": pytest.approx(100 * (1 + 0 + 1 + 2 / 3) / 4), "exact_match": 50.0, "examples": 4}
    assert or_none.answers.right(answers, rows).tolist() == [True, False, True, False]
    assert or_none.answers.wrongness(answers, rows).tolist() == pytest.approx([0, 1, 0, 1 / 3])
    assert or_none.answers.confusion(answers, rows) == {
        "labels": ["answer", "(none)"],
        "counts": [[0, 0, 2], [0, 1, 1], [1, 1, 1]],
    }
    table = or_none.answers.table(answers, rows)
    assert [(name, each["rows"], round(each["f1"], 2)) for name, each in table.items()] == [
        ("answer", 3.0, 55.56),
        ("(none)", 1.0, 100),
    ]
    record = or_none.answers.record(answers[3], rows[3])
    assert (record["question_id"], record["label"], record["prediction"]) == ("q4", ["actor"], "actor was")
    assert or_none.answers.lengths(rows).tolist() == [16, 16, 9, 9]


def test_two_models_agree_as_far_as_their_answers_share_characters(task):
    def at(start, end):
        return {"answer": CONTEXT[start:end], "start": start, "end": end}

    assert task.answers.agreement([at(19, 28), at(0, 0)], [at(19, 28), at(0, 0)]) == 1.0
    assert task.answers.agreement([at(19, 28)], [at(24, 28)]) == pytest.approx(8 / 13)
    assert task.answers.agreement([at(0, 3), at(0, 3)], [at(4, 9), at(0, 0)]) == 0.0


def test_the_answer_is_marked_in_what_stands_around_it(or_none):
    context = "x" * 300 + " good film " + "y" * 300
    row = {"question": "which?", "context": context}
    answer = {"answer": "good film", "start": 301, "end": 310, "score": 0.75}
    pieces = or_none.answers.pieces(answer, row)
    assert pieces[0] == ("which?\n", None) and pieces[2] == ("good film", "0.75")
    assert pieces[1][0] == "…" + "x" * 199 + " " and pieces[3][0] == " " + "y" * 199 + "…"
    none = or_none.answers.pieces({"answer": "", "start": 0, "end": 0, "score": 0.9}, {**row, "context": "short"})
    assert none == [("which?\n", None), ("", "no answer"), ("short", None)]


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
