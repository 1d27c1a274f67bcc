"""The answers to questions: spans of the context as it was given, windows, "no answer", and how they are judged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.answers import RowError
from engine.answers._quotes import Place
from engine.answers._spans import inside, tokens_of, trimmed
from engine.answers.question_answering import END, START, Answers, best_difference
from engine.tasks import question_answering
from tests.unit.questions import CONTEXT, LONG, NONE, ROWS, likes, qa_task, runs, tiny_model


@pytest.fixture
def task(tmp_path):
    return qa_task(tmp_path)


@pytest.fixture
def or_none(tmp_path):
    return qa_task(tmp_path, [*ROWS, NONE])


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


def test_two_models_agree_as_far_as_one_finds_the_others_answer_likely(task):
    def at(*places):
        spans = [{"answer": CONTEXT[start:end], "start": start, "end": end, "score": score} for start, end, score in places]
        return {**(spans[0] if spans else {"answer": "", "start": 0, "end": 0, "score": 0.9}), "n_best": spans}

    agreement = task.answers.agreement
    assert agreement([at((19, 28, 0.3)), at()], [at((19, 28, 0.8)), at()]) == 1.0
    assert agreement([at((24, 28, 0.5))], [at((19, 28, 0.5), (24, 28, 0.4))]) == pytest.approx(0.8)
    assert agreement([at((0, 3, 0.9))], [at((19, 28, 0.5), (24, 28, 0.4))]) == 0.0
    assert agreement([at((19, 28, 0.9)), at()], [at(), at((19, 28, 0.9))]) == 0.0


def test_the_answer_is_marked_in_what_stands_around_it(or_none):
    context = "x" * 300 + " good film " + "y" * 300
    row = {"question": "which?", "context": context}
    answer = {"answer": "good film", "start": 301, "end": 310, "score": 0.75}
    pieces = or_none.answers.pieces(answer, row)
    assert pieces[0] == ("which?\n", None) and pieces[2] == ("good film", "0.75")
    assert pieces[1][0] == "…" + "x" * 199 + " " and pieces[3][0] == " " + "y" * 199 + "…"
    none = or_none.answers.pieces({"answer": "", "start": 0, "end": 0, "score": 0.9}, {**row, "context": "short"})
    assert none == [("which?\n", None), ("", "no answer"), ("short", None)]
    told = or_none.answers.explained(answer, {**row, "answers": ["y" * 300]})
    assert told["inputs"] == {"question": "which?"} and told["answered"]["pieces"] == pieces[1:]
    assert ("y" * 300, "answer") in told["true"]["pieces"]


# Tokenizers of other kinds


def tokenizer_of(kind, length):
    """A tokenizer of bytes that keeps or trims spaces, or one that writes spaces as a sign; trained on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None if "bytes" in kind else "<unk>"))
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False) if "bytes" in kind else pre_tokenizers.Metaspace()
    tokenizer.pre_tokenizer = cut
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "bytes" in kind else []
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([LONG, CONTEXT, "北京 👩‍🚀 é"] * 3, trainer)
    if "bytes" in kind:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=kind == "trimmed bytes")
    else:
        pair = "<s> $A </s> $B:1 </s>:1"
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, [("<s>", 0), ("</s>", 2)])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "trimmed bytes", "signs"])
def strange(request):
    facts = {"question": "question", "context": "context", "answers": "answers", "stride": None, "max_answer": 6, "n_best": 9}
    return Answers({**facts, "may_be_none": False, "threshold": 0.0, "metric": "f1"}, tokenizer_of(request.param, 24))


@settings(max_examples=40, deadline=None)
@given(question=TEXTS, context=TEXTS, seed=st.integers(0, 2**32 - 1))
@example(question="", context="\n" * 60 + "a" + " \n" * 60, seed=0)
def test_answers_are_parts_of_the_context_whatever_the_tokenizer_makes_of_spaces(strange, question, context, seed):
    rng = np.random.default_rng(seed)

    def run(graph, arrays):
        return {name: 5 * rng.standard_normal(arrays["input_ids"].shape).astype(np.float32) for name in (START, END)}

    (answer,) = strange.answer(run, [{"question": question, "context": context}])
    assert bool(answer["n_best"]) == bool(context.strip())
    for each in answer["n_best"]:
        assert each["answer"] == context[each["start"] : each["end"]] == each["answer"].strip() != ""


@pytest.mark.parametrize("text", ["good film", "plot", "the actor", "an 北京", "👩‍🚀"])
def test_the_tokens_of_an_answer_give_the_answer_back(strange, text):
    context = f"{CONTEXT} in an 北京 👩‍🚀 scene"
    (encoded,) = strange.encode([{"question": "good " * 40, "context": context}])
    place = Place(context.index(text), context.index(text) + len(text))
    first, last = tokens_of(encoded, place)
    held = [inside(window, first, last) for window in encoded.windows]
    assert encoded.cut and any(held)
    for window, tokens in zip(encoded.windows, held, strict=True):
        if tokens:
            offsets = window.encoding.offsets
            assert trimmed(Place(offsets[tokens[0]][0], offsets[tokens[1]][1]), context) == place
