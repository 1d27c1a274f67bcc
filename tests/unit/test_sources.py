"""Sources of rows: which files, which rows of them, what becomes of their cells, and which split each falls into."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.data.cells import label_cell, refuse_scores, text_cell
from engine.data.sources import SourceConfig, SourceRows, share_of
from engine.data.splits import DataConfig, load_splits
from engine.errors import UserError
from engine.tasks.classification import Config
from tests.recipes import write_recipe, write_rows

TASK = Config(type="classification")


@pytest.fixture
def recipe(tmp_path):
    def recipe(text="stages: {x: {finetune: {}}}", *overrides):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", list(overrides))

    return recipe


def read(recipe, columns=None, **source):
    rows = SourceRows(SourceConfig(**source), recipe(), TASK.columns if columns is None else columns)
    return list(rows), rows.describe


def refused(recipe, **source):
    with pytest.raises(UserError) as error:
        read(recipe, **source)
    assert "\n" not in str(error.value)
    return str(error.value)


# Files.


def test_several_files_and_patterns_are_read_one_after_the_other(tmp_path, recipe):
    for name, count in (("b.jsonl", 2), ("a.jsonl", 1), ("c.csv", 0)):
        write_rows(tmp_path / name, [{"text": f"{name} {number}", "label": "x"} for number in range(count)])
    (tmp_path / "c.csv").write_text("label,text\ny,c.csv 0\n")
    rows, said = read(recipe, path=["*.jsonl", "c.csv"])
    assert [row["text"] for row in rows] == ["a.jsonl 0", "b.jsonl 0", "b.jsonl 1", "c.csv 0"]
    assert [(row.path.name, row.line) for row in rows] == [("a.jsonl", 1), ("b.jsonl", 1), ("b.jsonl", 2), ("c.csv", 2)]
    assert said[0] == f"{tmp_path / 'a.jsonl'} and 1 more: JSON lines, utf-8"
    assert said[1].startswith(f"{tmp_path / 'c.csv'}: CSV with ','")
    with pytest.raises(UserError, match=r"x\*.jsonl: no file of that pattern"):
        read(recipe, path="x*.jsonl")


def test_a_name_with_brackets_is_no_pattern_when_there_is_a_file_of_that_name(tmp_path, recipe):
    write_rows(tmp_path / "rows[1].jsonl", [{"text": "a", "label": "x"}])
    assert len(read(recipe, path="rows[1].jsonl")[0]) == 1


def test_line_aligned_files_are_columns_of_one_source(tmp_path, recipe):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "labels").write_text("x\ny\n")
    rows, _ = read(recipe, path={"text": "a.txt", "label": "labels"})
    assert rows == [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]


# Filters.

VALUES = [
    ("no", "no"),
    ("on", "on"),
    ("007", "007"),
    ("1_000", "1_000"),
    ("1.0", "1.0"),
    ("2024-01-01", "2024-01-01"),
    ("~", "~"),
]


@pytest.mark.parametrize("override", [False, True])
@pytest.mark.parametrize(("written", "cell"), VALUES)
def test_a_filter_takes_the_text_that_was_written(recipe, tmp_path, written, cell, override):
    (tmp_path / "rows.csv").write_text(f"text,label,lang\na,x,{cell}\nb,x,False\nc,x,7\n")
    text = "stages: {x: {finetune: {data: {train: {path: rows.csv, where: {lang: %s}}}}}}"
    loaded = recipe(text % "x", f"x.data.train.where.lang={written}") if override else recipe(text % written)
    source = SourceConfig(**loaded.stages["x"][1]["data"]["train"])
    assert [row["text"] for row in SourceRows(source, loaded, TASK.columns)] == ["a"]


@pytest.mark.parametrize(("written", "value"), [("true", True), ("1", 1), ("1.0", 1), ("0.5", 0.5), ("no", "no"), ("null", None)])
def test_a_filter_matches_json_values_as_they_are_written(tmp_path, recipe, written, value):
    write_rows(
        tmp_path / "rows.jsonl", [{"text": "a", "label": "x", "flag": value}, {"text": "b", "label": "x", "flag": "other"}]
    )
    assert [row["text"] for row in read(recipe, path="rows.jsonl", where={"flag": written})[0]] == ["a"]


def test_yes_and_no_are_text_and_still_switches(recipe):
    (_, section) = recipe("stages: {x: {finetune: {a: no, b: false, names: {no: yes, 01: 2}}}}").stages["x"]
    assert section == {"a": "no", "b": False, "names": {"no": "yes", "01": "2"}}


def test_a_filter_that_keeps_nothing_says_what_the_column_holds(tmp_path, recipe):
    write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "x", "lang": lang} for lang in ("de", "en", "de")])
    message = refused(recipe, path="rows.jsonl", where={"lang": "no"})
    assert "no rows where lang is 'no' (lang holds 'de', 'en'): an empty data set cannot be used" in message


# Cells.


@pytest.mark.parametrize("value", [None, "", math.nan])
def test_null_nothing_and_nan_are_missing(value):
    assert text_cell(value) is None
    assert label_cell(value) is None


def test_nan_is_no_label_in_any_spelling_but_a_text():
    assert [label_cell(text) for text in ("nan", "NaN", " NAN ")] == [None] * 3
    assert text_cell("nan") == "nan"


def test_words_are_joined_with_spaces_and_that_is_said(tmp_path, recipe):
    write_rows(tmp_path / "rows.jsonl", [{"text": ["a", "good", "film"], "label": ["x"]}, {"text": "plain", "label": 0}])
    rows, said = read(recipe, path="rows.jsonl")
    assert rows == [{"text": "a good film", "label": "x"}, {"text": "plain", "label": "0"}]
    assert "column 'text' of rows.jsonl holds lists of words: joined with spaces" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": {"en": "a", "de": "b"}, "label": "x"}, "column 'text' holds an object (en, de), which is no text"),
        ({"text": ["a", 1], "label": "x"}, "column 'text' holds a list that is no list of words"),
        ({"text": "a", "label": ["x", "y"]}, "column 'label' holds 2 labels, and this task gives a row one"),
        ({"text": "a", "label": {"x": 1}}, "column 'label' holds an object, which is no label"),
        ({"text": "a", "label": [{"x": 1}]}, "column 'label' holds an object, which is no label"),
        (
            {"text": "a", "label": math.nan},
            "column 'label' is empty in this row: fill it, or leave such rows out (missing: drop)",
        ),
        ({"text": "a", "label": []}, "column 'label' is empty in this row"),
        ({"text": [], "label": "x"}, "column 'text' is empty in this row"),
    ],
)
def test_a_cell_that_is_no_text_or_no_label_is_named_with_its_line(tmp_path, recipe, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "fine", "label": "x"}, row])
    assert refused(recipe, path="rows.jsonl").startswith(f"{path}:2: {message}")


def test_rows_without_text_or_label_are_left_out_when_asked_and_counted(tmp_path, recipe):
    rows = [
        {"text": "a", "label": "x"},
        {"text": "b", "label": None},
        {"text": "", "label": "x"},
        {"text": "c", "label": math.nan},
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    kept, said = read(recipe, path="rows.jsonl", missing="drop")
    assert [row["text"] for row in kept] == ["a"]
    assert "rows.jsonl: 3 rows without text or label left out" in said
    write_rows(tmp_path / "rows.jsonl", rows[1:])
    assert "no rows: all 3 lack text or label" in refused(recipe, path="rows.jsonl", missing="drop")


def test_a_column_that_a_file_without_header_does_not_have_leads_to_the_fix(tmp_path, recipe):
    (tmp_path / "rows.csv").write_text("a film,1\n")
    assert re.search(r"rows.csv:1: no column 'text' .*set header: true; if not, name them", refused(recipe, path="rows.csv"))


# Labels of the whole column.


@given(st.lists(st.floats(0, 5).filter(lambda number: not number.is_integer()), min_size=13, max_size=60, unique=True))
def test_many_different_fractions_are_scores_and_no_classes(numbers):
    with pytest.raises(UserError, match="scores are for regression, not for classification"):
        refuse_scores({str(number) for number in numbers}, "score")


@pytest.mark.parametrize(
    "labels",
    [{str(number / 2) for number in range(11)}, {str(number) for number in range(150)}, {f"{number}.0" for number in range(50)}],
)
def test_half_stars_and_numbered_classes_are_classes(labels):
    refuse_scores(labels, "label")
    refuse_scores({f"{number}.5" for number in range(50)} | {"good"}, "label")


def test_names_of_labels_that_are_not_there_are_refused():
    task = Config(type="classification", names={"0": "negative", "postive": "good"})
    with pytest.raises(UserError, match=r"task.names: 'postive' is no label of column 'label': did you mean 'positive'\?"):
        task.check_rows([{"label": "0"}, {"label": "positive"}], complete=True)
    task.check_rows([{"label": "0"}], complete=False)


def test_labels_that_are_scores_are_refused_by_a_look_at_the_file_with_its_name(tmp_path, call):
    recipe = write_recipe(tmp_path)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"film {number}", "label": number / 7} for number in range(60)])
    status, out, err = call("check", recipe)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {path}: column 'label' holds 60 different numbers (0 to 8.42857): scores are for regression")
    write_rows(path, [{"text": f"film {number}", "label": number % 2} for number in range(60)])
    status, _, err = call("check", recipe, "--set", "teacher.task.names.good=positive")
    assert (status, err) == (2, f"error: {path}: task.names: 'good' is no label of column 'label' (known: 0, 1)\n")


# Splits.


def split(recipe, tmp_path, rows, **data):
    write_rows(tmp_path / "rows.jsonl", rows)
    return load_splits(DataConfig(train="rows.jsonl", **data), recipe(), "text", TASK.columns, TASK.classes_of)


def test_a_hash_of_the_text_decides_the_split_and_equal_texts_stay_together(tmp_path, recipe):
    rows = [{"text": f"text {number % 150}", "label": str(number % 2)} for number in range(300)]
    splits = split(recipe, tmp_path, rows, validation="20%", test="10%")
    for name, low, high in (("test", 0.0, 0.1), ("validation", 0.1, 0.3), ("train", 0.3, 1.0)):
        assert splits[name]
        assert all(low <= share_of(row["text"]) < high for row in splits[name])
    assert sum(map(len, splits.values())) == 300
    assert not any("class" in note for note in splits.notes)


def test_a_class_that_the_hash_would_hold_out_as_a_whole_keeps_one_text_in_training_and_that_is_said(tmp_path, recipe):
    texts = [f"text {number}" for number in range(2000)]
    held_out = [text for text in texts if share_of(text) < 0.5]
    kept = [text for text in texts if share_of(text) >= 0.5][:50]
    rare = [*held_out[:3], held_out[0]]
    rows = [{"text": text, "label": "often"} for text in kept + held_out[10:50]]
    rows += [{"text": text, "label": "rare"} for text in rare] + [{"text": held_out[5], "label": "once"}]
    splits = split(recipe, tmp_path, rows, validation="30%", test="20%")
    moved = max(held_out[:3], key=share_of)
    trained = [row["text"] for row in splits["train"]]
    assert trained == kept + [text for text in rare if text == moved] + [held_out[5]] or set(trained) == {
        *kept,
        moved,
        held_out[5],
    }
    assert {row["text"] for name in ("validation", "test") for row in splits[name] if row["label"] == "rare"} == set(rare) - {
        moved
    }
    assert "2 classes of which all rows would have been held out got one text to train on: once, rare" in splits.notes


def test_test_rows_may_be_several_sets_by_name_read_one_after_the_other(tmp_path, recipe):
    for name in ("near", "far"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name} {number}", "label": "1"} for number in range(3)])
    sets = {"near": "near.jsonl", "far": {"path": ["far.jsonl"], "limit": 2}}
    splits = split(recipe, tmp_path, [{"text": "t", "label": "1"}, {"text": "u", "label": "0"}], validation=None, test=sets)
    assert [row["text"] for row in splits["test"]] == ["near 0", "near 1", "near 2", "far 0", "far 1"]
    assert splits.sets == {"near": 3, "far": 2}
    read = DataConfig(train="rows.jsonl", test=sets)
    assert DataConfig.model_validate(read.model_dump(mode="json")) == read
    assert len(read.sources) == 3


def test_a_held_out_row_without_the_column_of_a_slice_is_refused_with_its_line_and_a_training_row_may_lack_it(tmp_path, recipe):
    write_rows(tmp_path / "dev.jsonl", [{"text": "a", "label": "1", "product": "x"}, {"text": "b", "label": "0"}])
    rows = [{"text": "t", "label": "1"}]
    with pytest.raises(UserError, match=r"dev.jsonl:2: no column 'product' to slice by"):
        split(recipe, tmp_path, rows, validation="dev.jsonl", slices=["product"])
    assert split(recipe, tmp_path, rows, validation={"path": "dev.jsonl", "limit": 1}, slices="product").slices == ["product"]


def test_lines_with_another_number_of_cells_are_left_out_and_counted_where_that_is_said(tmp_path, recipe):
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t0\nb\nc\t1\td\ne\t1\n")
    rows = [{"text": "t", "label": "1"}]
    with pytest.raises(UserError, match=r"a.tsv:3: 1 columns where the header has 2: mend it, or .*bad_lines: drop"):
        split(recipe, tmp_path, rows, validation="a.tsv")
    splits = split(recipe, tmp_path, rows, validation={"path": "a.tsv", "bad_lines": "drop"})
    assert [row["text"] for row in splits["validation"]] == ["a", "e"]
    assert any(note.endswith("a.tsv: 2 lines with too few or too many cells left out") for note in splits.notes)
    with pytest.raises(UserError, match="bad_lines means nothing to the format jsonl"):
        split(recipe, tmp_path, rows, validation={"path": "rows.jsonl", "bad_lines": "drop"})


def test_validation_files_may_be_lists_and_have_a_layout_of_their_own(tmp_path, recipe):
    (tmp_path / "a.csv").write_text("text;label\na;0\nb;1\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\nc\t1\n")
    splits = split(recipe, tmp_path, [{"text": "t", "label": "1"}], validation=["a.csv", "b.tsv"])
    assert [row["text"] for row in splits["validation"]] == ["a", "b", "c"]
    assert len(splits.notes) == 3
