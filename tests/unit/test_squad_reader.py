"""SQuAD's JSON: rows, versions, answers beside their places, and what is refused."""

import json

import pytest

from engine.config import Recipe
from engine.data.readers import FormatConfig, find_layout
from engine.data.sources import SourceConfig, SourceRows
from engine.errors import UserError

CONTEXT = "The actor was born in Rome. He died in Oslo."


def asked(number, text, start, **more):
    return {"id": f"q{number}", "question": f"Question {number}?", "answers": [{"text": text, "answer_start": start}], **more}


def squad(*questions, context=CONTEXT, title="Actor"):
    return {"version": "v2.0", "data": [{"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}]}


def read(path, content, **options):
    """Writes a file and returns (its layout, [(line, row)])."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    layout = find_layout(path, FormatConfig(**options))
    return layout, list(layout.rows())


NONE = {
    "id": "q2",
    "question": "Where not?",
    "answers": [],
    "is_impossible": True,
    "plausible_answers": [{"text": "Oslo", "answer_start": 39}],
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("last", [True, False])
def test_a_question_is_a_row_wherever_the_keys_of_the_file_stand(tmp_path, indent, last):
    content = squad(asked(1, "Rome", 22), NONE)
    if last:
        content = {"meta": {"a": [1, {"b": "]"}]}, "data": content["data"], "version": "v2.0"}
    layout, rows = read(tmp_path / "dev.json", json.dumps(content, indent=indent))
    assert layout.describe == "SQuAD's JSON (v2.0), utf-8"
    same = {"title": "Actor", "context": CONTEXT}
    first = {"question": "Question 1?", "answers": [{"text": "Rome", "answer_start": 22}], "is_impossible": False}
    assert [row for _, row in rows] == [
        {"id": "q1", **same, **first},
        {"id": "q2", **same, "question": "Where not?", "answers": [], "is_impossible": True},
    ]
    assert {line for line, _ in rows} == ({1} if indent is None else {rows[0][0]})


def test_an_answer_beside_its_place_is_moved_there_and_counted(tmp_path):
    layout, rows = read(tmp_path / "a.json", squad(asked(1, "Rome", 25), asked(2, "Oslo", 39), asked(3, "He", 27)))
    assert [row["answers"][0]["answer_start"] for _, row in rows] == [22, 39, 28]
    assert layout.describe.endswith("; 2 answers stood a few characters beside answer_start: moved there")
    list(layout.rows())
    assert layout.moved == 2, "counted anew by every reading"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad(asked(1, "Rome", 22), asked(7, "Rome", 0)), "question q7: the answer 'Rome' does not stand at 0"),
        (squad(asked(7, "Bergen", 4)), "question q7: the answer 'Bergen' does not stand at 4"),
        (squad({**asked(7, "Rome", 22), "question": None}), "question q7: has no text"),
        (squad({**asked(7, "Rome", 22), "answers": [{"answer_start": 1}]}), "question q7: holds an answer without a text"),
        (squad(context=None), "article 'Actor': a paragraph has no context"),
        ({"data": [{"title": "T", "paragraphs": "x"}]}, "article 'T' has no list of objects \"paragraphs\""),
        ({"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [1]}]}]}, 'a paragraph has no list of objects "qas"'),
        ({"data": ["paragraphs"]}, "a row must be a JSON object, not str"),
        (json.dumps(squad(asked(1, "Rome", 22)))[:-4], "a.json:1: "),
    ],
)
def test_what_is_no_squad_is_named_with_file_and_question(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.json", content, format="squad")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}:1: ") and message.removeprefix("a.json:1: ") in str(error.value)
    assert "\n" not in str(error.value)


def test_other_json_is_read_as_before(tmp_path):
    assert read(tmp_path / "a.json", '{"text": "a", "data": [1]}\n{"text": "b", "data": []}\n')[0].NAME == "jsonl"
    assert read(tmp_path / "b.json", [{"data": [], "paragraphs": 1}])[0].NAME == "json"


def test_a_look_at_the_top_of_a_file_on_one_line_knows_that_it_goes_on(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(squad(*(asked(number, "Rome", 22) for number in range(9)))))
    (tmp_path / "b.json").write_text(json.dumps([{"text": str(number)} for number in range(9)]))
    for name in ("a.json", "b.json"):
        rows = SourceRows(SourceConfig(path=str(tmp_path / name)), Recipe.here(), {}, 4)
        assert (len(list(rows)), rows.complete) == (4, False)
        rows.lines = 10
        assert (len(list(rows)), rows.complete) == (9, True)
