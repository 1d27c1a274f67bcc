"""Stores of rows and encoded rows: what is read is what was written, by its number alone."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.sources import PlacedRow
from engine.data.stored import RowWriter, StoredExamples, StoredRows, lengths_of, write_examples

PROPERTY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=8)
VALUES = st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT, max_size=3)


@given(
    st.lists(st.tuples(st.dictionaries(TEXT, VALUES, max_size=3), st.none() | st.integers(0, 2), st.integers(1, 99)), max_size=8)
)
@PROPERTY
def test_stored_rows_are_the_rows_with_their_places(tmp_path, given_rows):
    rows = [row if path is None else PlacedRow(row, Path(f"/data/{path}.csv"), line) for row, path, line in given_rows]
    writer = RowWriter(tmp_path / "train")
    for row in rows:
        writer.append(row)
    writer.close()
    found = StoredRows(tmp_path / "train")
    assert list(found) == found[:] == rows
    assert found[1::2] == rows[1::2]
    assert len(found) == len(rows)
    for row, again in zip(rows, found, strict=True):
        assert getattr(row, "path", None) == getattr(again, "path", None)
        assert getattr(row, "line", None) == getattr(again, "line", None)
    with pytest.raises(IndexError):
        found[len(rows)]


@given(st.lists(st.tuples(TOKENS, TOKENS, st.none() | st.integers() | st.floats(allow_nan=False), TEXT), min_size=1, max_size=8))
@PROPERTY
def test_stored_examples_are_the_examples(tmp_path, values):
    examples = [{"input_ids": ids, "label": label, "tags": tags, "id": text} for ids, tags, label, text in values]
    written = write_examples(iter(examples), tmp_path / "train")
    for found in (written, StoredExamples(tmp_path / "train")):
        assert [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in e.items()} for e in found] == examples
        assert [list(example) for example in found] == [["input_ids", "label", "tags", "id"]] * len(examples)
        assert lengths_of(found).tolist() == lengths_of(examples).tolist() == [len(ids) for ids, *_ in values]
        assert found[-1]["id"] == examples[-1]["id"]


def test_examples_that_are_not_alike_are_refused(tmp_path):
    first = {"input_ids": [1, 2], "label": 0}
    with pytest.raises(ValueError, match="has the columns"):
        write_examples([first, {"input_ids": [1]}], tmp_path / "a")
    with pytest.raises(ValueError, match="holds no whole numbers"):
        write_examples([first, {"input_ids": [1.5], "label": 0}], tmp_path / "b")
    with pytest.raises(OverflowError):
        write_examples([{"input_ids": [2**31], "label": 0}], tmp_path / "c")


def test_nothing_and_not_a_number_are_kept(tmp_path):
    (found,) = write_examples([{"input_ids": [], "score": math.nan, "scores": [0.5, 1.0]}], tmp_path / "a")
    assert len(found["input_ids"]) == 0
    assert math.isnan(found["score"])
    assert found["scores"] == [0.5, 1.0]
    assert len(write_examples([], tmp_path / "b")) == 0
