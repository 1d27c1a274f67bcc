"""Answers quoted from a text: how cells hold them, where they are found, and the official figures."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.answers._quotes import REACH, Quote, normalised, place_of, quotes_of, right_answers, score

WORDS = ["the", "a", "an", "An", "Paris", "paris,", "in", "1998", "–", "!", "  ", "étude", "U.S."]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"text": "Rome", "answer_start": 3}], [Quote("Rome", 3)]),
        ({"text": ["Rome", "in Rome"], "answer_start": [3, 0]}, [Quote("Rome", 3), Quote("in Rome", 0)]),
        ({"text": [], "answer_start": []}, []),
        ({"text": "Rome", "answer_start": 3}, [Quote("Rome", 3)]),
        (["Rome"], [Quote("Rome", None)]),
        ("Rome", [Quote("Rome", None)]),
        ([], []),
    ],
)
def test_answers_are_read_in_the_forms_that_data_sets_have(value, expected):
    assert quotes_of(value) == expected


@pytest.mark.parametrize(
    "value", [3, [3], [{"text": 3}], [{"text": " "}], [{"answer_start": 3}], {"text": ["a"], "answer_start": []},
              [{"text": "a", "answer_start": "3"}], [{"text": "a", "answer_start": -1}], [{"text": "a", "answer_start": True}]]
)  # fmt: skip
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(ValueError, match="holds"):
        quotes_of(value)


def test_an_impossible_question_has_no_answer_whatever_stands_beside_it():
    assert right_answers({"is_impossible": True}, [{"text": "x", "answer_start": 0}]) == []
    assert right_answers({"is_impossible": False}, ["x"]) == [Quote("x", None)]


@given(st.text("ab ", min_size=1, max_size=30), st.data())
def test_an_answer_is_found_at_its_place_or_nearest_to_it(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    told = max(0, start + data.draw(st.integers(-REACH, REACH)))
    place = place_of(Quote(context[start:end], told), context)
    assert context[slice(*place)] == context[start:end]
    others = [at for at in range(len(context)) if context.startswith(context[start:end], at)]
    assert abs(place.start - told) == min(abs(at - told) for at in others)


@pytest.mark.parametrize(
    ("quote", "message"),
    [
        (Quote("Rome", 0), "does not stand at 0 ('Once' does), it does at 20: mend answer_start"),
        (Quote("Oslo", 3), "nor anywhere else in its context"),
        (Quote("Oslo", None), "does not stand in its context"),
        (Quote("o", None), "more than once: say which by answer_start"),
    ],
)
def test_an_answer_that_is_not_there_is_refused(quote, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        place_of(quote, "Once upon a time in Rome, oh Rome too")


def test_normalising_is_that_of_the_official_evaluation():
    assert normalised("The  U.S.'s  an-swer, a «Quote»!") == "uss answer «quote»"
    assert normalised("a The an") == ""


def rederived(prediction: str, golds: list[str], version: str) -> tuple[float, float]:
    """The two measures, written anew from the description of the official scripts."""

    def tokens(text):
        kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return [word for word in re.split(r"\s+", re.sub(r"\b(?:a|an|the)\b", " ", kept)) if word]

    if version == "2.0":
        golds = [gold for gold in golds if tokens(gold)] or [""]
    exact, best, mine = 0.0, 0.0, tokens(prediction)
    for gold in golds:
        theirs = tokens(gold)
        exact = max(exact, float(mine == theirs))
        same = sum(min(count, Counter(theirs)[word]) for word, count in Counter(mine).items())
        if version == "2.0" and (not mine or not theirs):
            f1 = float(mine == theirs)
        else:
            f1 = 2 * same / (len(mine) + len(theirs)) if same else 0.0
        best = max(best, f1)
    return exact, best


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["1.1", "2.0"]))
@example("", ["the"], "1.1")
@example("", ["the"], "2.0")
@example("the", ["Paris", "a"], "2.0")
def test_figures_are_those_that_follow_from_the_description(prediction, golds, version):
    assert score(prediction, tuple(golds), version == "2.0") == pytest.approx(rederived(prediction, golds, version), abs=1e-12)


def test_a_question_without_an_answer_is_right_when_it_gets_none():
    for may_be_none in (False, True):
        assert score("", (), may_be_none)[0] == 1.0
        assert score("Paris", (), may_be_none) == (0.0, 0.0)
    assert score("", (), True).f1 == 1.0


def test_figures_agree_with_torchmetrics():
    squad = pytest.importorskip("torchmetrics.functional.text", reason="torchmetrics is not installed").squad
    rng = np.random.default_rng(0)
    # Where normalising leaves nothing it counts as SQuAD 2.0 does, which official 1.1 does not.
    drawn = [[" ".join([*rng.choice(WORDS, rng.integers(0, 6)), "in"]) for _ in range(4)] for _ in range(80)]
    predictions = [{"prediction_text": first, "id": str(index)} for index, (first, *_) in enumerate(drawn)]
    target = [
        {"answers": {"text": golds, "answer_start": [0] * len(golds)}, "id": str(index)}
        for index, (_, *golds) in enumerate(drawn)
    ]
    theirs = squad(predictions, target)
    ours = np.array([score(first, tuple(golds), False) for first, *golds in drawn])
    assert float(theirs["exact_match"]) == pytest.approx(100 * ours[:, 0].mean(), abs=2e-5)  # theirs is float32
    assert float(theirs["f1"]) == pytest.approx(100 * ours[:, 1].mean(), abs=2e-5)
