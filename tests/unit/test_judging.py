"""Answers judged group by group, and what was answered worst."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.answers import Metric
from engine.answers.classification import Answers as Classification
from engine.answers.multi_label import Answers as MultiLabel
from engine.answers.regression import Answers as Regression
from engine.errors import UserError
from engine.judging import (
    FEWEST_ROWS,
    LENGTH,
    MOST_GROUPS,
    SETS,
    WORST,
    ends_of,
    groups_of,
    intervals_of,
    judge_slices,
    judged_sets,
    mistakes,
    quick_intervals,
    set_names,
)
from tests.recipes import finetune_section, ragged_rows, run_here, write_recipe, write_rows

FACTS = {"text": "text", "label": "label", "names": {}, "positive": None, "metric": "accuracy", "labels": ["bad", "good"]}


def classifier(**changes):
    return Classification({**FACTS, **changes}, None)


def answered(rights, languages=None):
    """Rows that are all good, and answers of which those are right that `rights` says."""
    rows = [{"text": f"text {i}", "label": "good", "language": languages[i] if languages else "en"} for i in range(len(rights))]
    answers = []
    for index, right in enumerate(rights):
        score = 0.6 + 0.3 * (index % 7) / 7
        scores = {"bad": 1 - score, "good": score} if right else {"bad": score, "good": 1 - score}
        answers.append({"label": "good" if right else "bad", "score": score, "scores": scores})
    return answers, rows


def groups(found):
    return {group["value"]: group for group in found["groups"]}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", None, "", 3, 2.5, "x,y"]) | st.integers(0, 99), min_size=1, max_size=200))
def test_every_row_is_in_exactly_one_group(cells):
    found = groups_of(cells)
    assert sorted(np.concatenate([group.rows_N for group in found])) == list(range(len(cells)))
    assert len(found) <= MOST_GROUPS + 1
    assert all(len(group.rows_N) for group in found)


def test_rare_values_are_pooled_and_counted():
    cells = ["en"] * 50 + ["no"] * 20 + ["fi"] * 3 + ["sv"] * 2 + [None]
    found = groups_of(cells)
    assert [(group.value, len(group.rows_N), group.pooled) for group in found] == [
        ("en", 50, 0),
        ("no", 20, 0),
        ("others (3 values)", 6, 3),
    ]


def test_of_many_frequent_values_the_most_frequent_stay_and_there_are_never_more_groups_than_said():
    cells = [f"v{value:02d}" for value in range(20) for _ in range(40 - value)]
    found = groups_of(cells)
    assert len(found) == MOST_GROUPS
    assert [group.value for group in found[:-1]] == [f"v{value:02d}" for value in range(MOST_GROUPS - 1)]
    assert found[-1].pooled == 20 - (MOST_GROUPS - 1)


def test_exactly_as_many_frequent_values_as_there_may_be_are_a_group_each():
    cells = [f"v{value}" for value in range(MOST_GROUPS) for _ in range(FEWEST_ROWS)]
    assert len(groups_of(cells)) == MOST_GROUPS
    assert not any(group.pooled for group in groups_of(cells))


def test_many_numbers_are_cut_into_quartiles_also_where_the_file_holds_them_as_text():
    for cells in (list(range(100)), [str(number) for number in range(100)]):
        found = groups_of(cells)
        assert [group.value for group in found] == ["0 to 24", "25 to 49", "50 to 74", "75 to 99"]
        assert [len(group.rows_N) for group in found] == [25] * 4


def test_few_different_numbers_are_values_like_others():
    assert {group.value for group in groups_of([1, 2, 3] * 20)} == {"1", "2", "3"}


def test_a_group_that_is_clearly_worse_is_named_and_one_that_may_be_chance_is_not():
    languages = ["en"] * 300 + ["no"] * 60
    clear = answered([True] * 290 + [False] * 10 + [True] * 30 + [False] * 30, languages)
    chance = answered([True] * 290 + [False] * 10 + [True] * 57 + [False] * 3, languages)
    found = judge_slices(classifier(), *clear, ["language"])["language"]
    assert found["worst"]["value"] == "no"
    assert found["worst"]["rest"]["value"] == pytest.approx(100 * 290 / 300)
    assert groups(found)["no"]["metrics"]["accuracy"]["value"] == 50.0
    assert groups(found)["no"]["rows"] == 60
    assert judge_slices(classifier(), *chance, ["language"])["language"]["worst"] is None


def test_a_large_group_that_is_worse_than_a_small_rest_is_named_too():
    answers, rows = answered([True] * 720 + [False] * 180 + [True] * 99 + [False], ["en"] * 900 + ["no"] * 100)
    assert judge_slices(classifier(), answers, rows, ["language"])["language"]["worst"]["value"] == "en"


def test_a_handful_of_rows_is_never_called_worse():
    rights = [True] * 200 + [False] * (FEWEST_ROWS - 1)
    found = judge_slices(classifier(), *answered(rights, ["en"] * 200 + ["no"] * (FEWEST_ROWS - 1)), ["language"])["language"]
    assert found["worst"] is None


def test_where_lower_is_better_the_worst_group_is_the_one_with_the_largest_error():
    facts = {"text": "text", "label": "label", "metric": "rmse", "mean": [0.0], "sd": [1.0]}
    rows = [{"text": str(i), "label": 0.0, "product": "a" if i < 100 else "b"} for i in range(200)]
    given = [{"values": {"label": (0.1 if i < 100 else 2.0) + 0.01 * (i % 5)}} for i in range(200)]
    assert judge_slices(Regression(facts, None), given, rows, ["product"])["product"]["worst"]["value"] == "b"


def test_every_metric_of_a_group_lies_in_its_interval_and_is_that_of_its_rows_alone():
    rng = np.random.default_rng(0)
    answers, rows = answered((rng.random(120) < 0.8).tolist(), rng.choice(["en", "no"], 120).tolist())
    found = groups(judge_slices(classifier(), answers, rows, ["language"])["language"])
    for value, group in found.items():
        chosen = [index for index, row in enumerate(rows) if row["language"] == value]
        own = classifier().metrics([answers[i] for i in chosen], [rows[i] for i in chosen])
        assert group["rows"] == own.pop("examples")
        assert {name: metric["value"] for name, metric in group["metrics"].items()} == own
        assert all(m["low"] <= m["value"] <= m["high"] for m in group["metrics"].values())


def test_length_means_tokens_unless_the_rows_have_such_a_column():
    class Counted(Classification):
        def lengths(self, rows):
            return np.array([len(row["text"]) for row in rows])

    answers, rows = answered([True] * 40)
    for index, row in enumerate(rows):
        row["text"] = "x" * (index + 1)
    found = judge_slices(Counted(FACTS, None), answers, rows, [LENGTH])[LENGTH]
    assert [group["value"] for group in found["groups"]] == ["1 to 10", "11 to 20", "21 to 30", "31 to 40"]
    named = [{**row, "length": "short" if index < 20 else "long"} for index, row in enumerate(rows)]
    assert {*groups(judge_slices(Counted(FACTS, None), answers, named, [LENGTH])[LENGTH])} == {"short", "long"}


def test_a_column_that_rows_lack_is_one_line():
    answers, rows = answered([True] * 3)
    with pytest.raises(UserError, match="no column 'langauge' to slice by: did you mean 'language'"):
        judge_slices(classifier(), answers, rows, ["langauge"])


def test_test_sets_are_judged_one_by_one_and_their_rows_named():
    answers, rows = answered([True] * 30 + [False] * 10)
    sets = {"matched": 30, "mismatched": 10}
    found = judged_sets(classifier(), answers, rows, sets)
    assert {name: metrics["accuracy"] for name, metrics in found.items()} == {"matched": 100.0, "mismatched": 0.0}
    assert {
        value: group["rows"] for value, group in groups(judge_slices(classifier(), answers, rows, [], sets)[SETS]).items()
    } == sets
    assert [named["set"] for named in set_names(sets, 40)] == ["matched"] * 30 + ["mismatched"] * 10
    assert set_names({}, 2) == [{}, {}]


def test_the_worst_errors_are_the_most_confident_ones_with_text_truth_and_answer():
    answers, rows = answered([False] * 30 + [True] * 5)
    found = mistakes(classifier(), answers, rows)
    offs = [error["off"] for error in found["worst"]]
    assert len(offs) == WORST
    assert offs == sorted(offs, reverse=True)
    assert offs[0] == pytest.approx(max(answer["score"] for answer in answers[:30]), abs=1e-6)
    first = found["worst"][0]
    assert (first["label"], first["prediction"], first["inputs"]) == ("good", "bad", {"text": "text 6"})
    assert found["off_by"] == "probability of the wrong label"
    assert found["confusion"] == {"labels": ["bad", "good"], "counts": [[1, 0, 30], [1, 1, 5]]}


def test_right_answers_are_no_errors():
    assert mistakes(classifier(), *answered([True] * 30))["worst"] == []


def test_errors_of_several_labels_are_as_bad_as_their_worst_label():
    facts = {"text": "text", "label": "tags", "separator": None, "names": {}, "labels": ["a", "b"], "thresholds": [0.5, 0.5]}
    task = MultiLabel({**facts, "metric": "f1_micro"}, None)
    rows = [{"text": "x", "tags": ["a"]}, {"text": "y", "tags": ["a"]}, {"text": "z", "tags": []}]
    scores = [{"a": 0.9, "b": 0.2}, {"a": 0.3, "b": 0.2}, {"a": 0.1, "b": 0.95}]
    given = task.revised([{"scores": entry} for entry in scores])
    np.testing.assert_allclose(task.wrongness(given, rows), [0.0, 0.7, 0.95], atol=1e-6)
    table = task.table(given, rows)
    assert (table["a"]["missed"], table["a"]["wrong"], table["b"]["wrong"]) == (1, 0, 1)
    assert [error["inputs"]["text"] for error in mistakes(task, given, rows)["worst"]] == ["z", "y"]


def test_errors_of_numbers_are_in_standard_deviations_and_their_points_are_kept():
    facts = {"text": "text", "label": "label", "metric": "pearson", "mean": [2.0], "sd": [0.5]}
    rows = [{"text": str(i), "label": float(i)} for i in range(4)]
    given = [{"values": {"label": float(i) + (1.0 if i == 2 else 0.0)}} for i in range(4)]
    found = mistakes(Regression(facts, None), given, rows)
    assert [(error["inputs"]["text"], error["off"]) for error in found["worst"]] == [("2", 2.0)]
    assert found["points"] == {"label": [[0.0, 0.0], [1.0, 1.0], [2.0, 3.0], [3.0, 3.0]]}


def test_a_metric_that_is_no_share_keeps_its_interval_and_one_that_is_needs_none():
    rng = np.random.default_rng(1)
    answers, rows = answered((rng.random(200) < 0.7).tolist())
    for row in rows[::3]:
        row["label"] = "bad"
    task = classifier(metric="f1_macro")
    ends = ends_of(task, answers, rows)
    assert ends["f1_macro_low"] < task.metrics(answers, rows)["f1_macro"] < ends["f1_macro_high"]
    assert ends_of(classifier(), answers, rows) == {}
    assert task.metric == Metric("f1_macro")


def test_fewer_resamples_give_nearly_the_same_interval():
    rng = np.random.default_rng(2)
    answers, rows = answered((rng.random(150) < 0.7).tolist())
    slow, quick = (judge(classifier(), answers, rows)["loss"] for judge in (intervals_of, quick_intervals))
    assert quick.value == slow.value
    assert abs(quick.low - slow.low) + abs(quick.high - slow.high) < 0.2 * (slow.high - slow.low)


def test_a_stage_leaves_slices_sets_and_mistakes_beside_its_predictions(tmp_path):
    rows = [{**row, "language": "en" if index % 3 else "no"} for index, row in enumerate(ragged_rows(120))]
    for name, part in (("rows", rows[:80]), ("matched", rows[80:100]), ("mismatched", rows[100:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    sets = {"matched": "matched.jsonl", "mismatched": "mismatched.jsonl"}
    data = {"train": "rows.jsonl", "validation": "25%", "test": sets, "slices": ["language", "length"]}
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(data=data)}})
    done = run_here(recipe, "teacher", tmp_path / "runs").directory
    metrics = json.loads((done / "stage.json").read_text())["metrics"]
    assert {name: split["examples"] for name, split in metrics.items() if name != "validation"} == {
        "test": 40,
        "test.matched": 20,
        "test.mismatched": 20,
    }
    slices = json.loads((done / "slices.json").read_text())
    assert {*slices["validation"]} == {"language", "length"}
    assert {*slices["test"]} == {"language", "length", SETS}
    assert sum(group["rows"] for group in slices["test"]["length"]["groups"]) == 40
    of_set = groups(slices["test"][SETS])["matched"]["metrics"]["accuracy"]["value"]
    assert of_set == metrics["test.matched"]["accuracy"]
    wrong = json.loads((done / "mistakes.json").read_text())["test"]
    lines = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    missed = [line for line in lines if line["label"] != line["prediction"]]
    assert len(wrong["worst"]) == min(WORST, len(missed))
    assert [line["set"] for line in lines] == ["matched"] * 20 + ["mismatched"] * 20
