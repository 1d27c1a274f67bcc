"""Schemes of tags: which one a file has, what its tags mark, and what breaks it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.answers._schemes import Evidence, SchemeError, Span, labels_of, marks_entities, spans_of, tags_of

LETTERS = {"bio": "BIIB", "iob1": None, "bioes": "BIES", "bmes": "BMES", "bilou": "BILU"}
"""First, inner, last word and single one."""


@st.composite
def marked(draw):
    """(number of words, entities in order) of a sentence; neighbours may touch."""
    spans, at = [], 0
    for _ in range(draw(st.integers(0, 5))):
        at += draw(st.integers(0, 2))
        end = at + draw(st.integers(1, 4))
        spans.append(Span(at, end, draw(st.sampled_from(["LOC", "PER", "a-b_c"]))))
        at = end
    return at + draw(st.integers(0, 2)), spans


def written(words, spans, scheme):
    """The tags of a sentence in any scheme, by its definition."""
    tags = ["O"] * words
    for place, (first, end, kind) in enumerate(spans):
        touches = place > 0 and spans[place - 1].end == first and spans[place - 1].type == kind
        for index in range(first, end):
            if scheme == "iob1":
                letter = "B" if index == first and touches else "I"
            else:
                begin, inner, last, single = LETTERS[scheme]
                letter = single if end - first == 1 else begin if index == first else last if index == end - 1 else inner
            tags[index] = f"{letter}-{kind}"
    return tags


@pytest.mark.parametrize("scheme", LETTERS)
@given(sentence=marked())
def test_tags_of_every_scheme_are_read_back_as_the_entities_that_they_mark(scheme, sentence):
    words, spans = sentence
    assert spans_of(written(words, spans, scheme), scheme) == spans


@pytest.mark.parametrize("scheme", ["bio", "bioes"])
@given(sentence=marked())
def test_what_the_model_learns_is_written_as_the_scheme_has_it(scheme, sentence):
    words, spans = sentence
    tags = tags_of(spans, words, scheme)
    assert tags == written(words, spans, scheme)
    assert set(tags) <= set(labels_of(["LOC", "PER", "a-b_c"], scheme))


@pytest.mark.parametrize("scheme", LETTERS)
def test_the_scheme_of_a_file_is_seen_in_its_tags(scheme):
    sentences = [
        (6, [Span(0, 2, "LOC"), Span(3, 4, "PER")]),
        (4, [Span(1, 4, "LOC")]),
        (5, [Span(0, 2, "LOC"), Span(2, 5, "LOC")]),
    ]
    evidence = Evidence()
    for words, spans in sentences:
        evidence.add(written(words, spans, scheme))
    assert evidence.scheme == scheme


def test_one_broken_sentence_does_not_make_it_another_scheme():
    evidence = Evidence()
    for tags in (["B-LOC", "I-LOC", "O"], ["O", "B-PER"], ["O", "I-PER"]):
        evidence.add(tags)
    assert evidence.scheme == "bio"


@pytest.mark.parametrize("tags", [["NOUN", "VERB"], ["O", "O"], ["B-LOC", "NOUN"], ["O", "X-LOC"]])
def test_tags_that_mark_nothing_have_no_scheme(tags):
    evidence = Evidence()
    evidence.add(tags)
    assert evidence.scheme is None and not marks_entities(tags)


def test_tags_without_a_type_mark_spans_of_one_kind():
    assert spans_of(["B", "M", "E", "S"], "bmes") == [Span(0, 3, "span"), Span(3, 4, "span")]


@pytest.mark.parametrize(
    ("tags", "scheme", "index", "message"),
    [
        (["O", "I-LOC"], "bio", 1, "I-LOC stands behind O"),
        (["I-LOC"], "bio", 0, "I-LOC stands behind nothing"),
        (["B-LOC", "I-PER"], "bio", 1, "I-PER stands behind B-LOC"),
        (["O", "B-LOC"], "iob1", 1, "B-LOC stands behind no entity of its type"),
        (["B-LOC", "O"], "bioes", 0, "B-LOC ends no entity, and O follows"),
        (["O", "B-LOC"], "bmes", 1, "B-LOC ends no entity, and nothing follows"),
        (["S-LOC", "E-LOC"], "bioes", 1, "E-LOC stands behind S-LOC"),
        (["B-LOC", "L-PER"], "bilou", 0, "B-LOC ends no entity, and L-PER follows"),
        (["B-LOC", "NOUN"], "bio", 1, "'NOUN' is no tag of a scheme"),
    ],
)
def test_tags_that_break_their_scheme_are_named(tags, scheme, index, message):
    with pytest.raises(SchemeError, match=message) as error:
        spans_of(tags, scheme)
    assert error.value.index == index
