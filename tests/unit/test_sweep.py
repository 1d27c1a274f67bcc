"""A sweep: its points, its runs, its table; started again it goes on."""

import csv
import json
import shutil

import pytest

from engine.config import load_recipe
from engine.errors import PREEMPTED, UserError
from engine.stages.stage import read_stage
from launch.points import draw_points, expand_sweep, read_points, write_points
from launch.slurm.script import BatchOptions
from launch.slurm.submit import prepare_submission
from launch.sweep import points_of, run_points, show, table_of, write_table
from launch.watchdog import StageError
from tests.recipes import finetune_section, pretrain_section, run_here, train_section, write_recipe
from tests.unit.runs import write_stage

GRID = ["train.learning_rate=1e-3,3e-3", "train.steps=2,4"]


def points(path, *values, count=None, seed=0, stage="teacher"):
    return points_of(path, stage, list(values), path.parent / "runs", count, seed)


def test_keys_are_those_of_the_stage_and_each_combination_is_a_run_of_its_own(tmp_path):
    path = write_recipe(tmp_path)
    found = points(path, *GRID, "seed=1,2")
    assert len(found) == 8
    assert found[0].variant.overrides == ("teacher.train.learning_rate=1e-3", "teacher.train.steps=2", "seed=1")
    assert found[0].recipe.name == "tiny-learning_rate-1e-3-steps-2-seed-1"
    assert len({point.recipe.name for point in found}) == 8
    assert {point.stages[-1].config.train.learning_rate for point in found} == {1e-3, 3e-3}


def test_points_are_the_runs_of_a_slurm_array_of_the_same_values(tmp_path):
    path = write_recipe(tmp_path)
    found = points(path, *GRID)
    sweep = [f"teacher.{value}" for value in GRID]
    for given in (sweep, [str(write_points(tmp_path / "x", [point.variant for point in found]))]):
        submission = prepare_submission(path, [], tmp_path / "runs", [], BatchOptions(), given)
        assert [task.run.name for task in submission.batch.tasks] == [point.recipe.name for point in found]
        assert [task.overrides for task in submission.batch.tasks] == [tuple(point.settings) for point in found]


def test_random_points_are_drawn_from_lists_and_ranges_once_each_and_the_same_again():
    values = ["a.learning_rate=1e-5..1e-3", "a.epochs=2..4", "a.kind=x,y", "a.bias=-1.0..1.0"]
    drawn = draw_points(values, 40, seed=1)
    assert drawn == draw_points(values, 40, seed=1)
    assert drawn[:10] == draw_points(values, 10, seed=1), "a longer sweep goes on from a shorter one"
    assert drawn != draw_points(values, 40, seed=2)
    settings = [dict(setting.split("=") for setting in variant.overrides) for variant in drawn]
    rates = [float(point["a.learning_rate"]) for point in settings]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert sum(rate < 1e-4 for rate in rates) > 10, "evenly by the logarithm"
    assert {point["a.epochs"] for point in settings} == {"2", "3", "4"}
    assert {point["a.kind"] for point in settings} == {"x", "y"}
    assert min(float(point["a.bias"]) for point in settings) < 0
    assert len({variant.suffix for variant in drawn}) == 40


def test_there_are_no_more_random_points_than_combinations():
    assert len(draw_points(["a.b=1,2", "a.c=1..3"], 50, seed=0)) == 6


def test_points_come_back_from_their_file(tmp_path):
    variants = expand_sweep(["a.b=1,2", "a.c=[1, 2],[3]"])
    assert read_points(write_points(tmp_path, variants)) == variants
    assert expand_sweep([str(tmp_path / "points.json")]) == variants


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "nothing to vary"),
        (["train.learning_rate"], {}, "--set teacher.train.learning_rate: write it as key=value,value"),
        (["train.learning_rate=1e-5..1e-3"], {}, "a range is for random points: add --random N"),
        (["train.learning_rate=1e-3..1e-5"], {"count": 2}, "a range begins with its smaller end"),
        (["train.learning_rate=1.2.3..4"], {"count": 2}, "a range goes from one number to another"),
        (["train.learning=1,2"], {}, "unknown key 'learning': did you mean 'learning_rate'"),
        (["train.batch_size=8,7"], {}, None),
        (["train.micro_batch_size=8,3"], {}, "batch_size=8 is not a multiple of micro batch 3"),
        (["train.steps=2,3"], {"stage": "techer"}, "--stage techer: .* did you mean 'teacher'"),
    ],
)
def test_every_point_is_looked_at_before_any_runs(tmp_path, values, options, message):
    path = write_recipe(tmp_path)
    if message is None:
        assert points(path, *values, **options)
        return
    with pytest.raises(UserError, match=message) as error:
        points(path, *values, **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"run": "a"}]', '[{"run": "../a", "set": []}]'])
def test_a_file_that_holds_no_points_is_one_line(tmp_path, text):
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(UserError, match="not a file of points"):
        read_points(tmp_path / "points.json")
    with pytest.raises(UserError, match="no such file of points"):
        read_points(tmp_path / "other.json")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A recipe and its sweep of two points over a stage that reads another, run once."""
    root = tmp_path_factory.mktemp("sweep")
    teacher = finetune_section(model="base", train=train_section(steps=2))
    path = write_recipe(
        root, {"base": {"pretrain": pretrain_section(train=train_section(steps=2))}, "teacher": {"finetune": teacher}}
    )
    ran = []

    def run(point):
        for stage in point.stages:
            if not stage.finished():
                ran.append((point.recipe.name, stage.name))
                run_here(path, stage.name, root / "runs", *point.settings)

    found = points(path, "train.learning_rate=1e-3,1e-2")
    failed = run_points(found, [load_recipe(path, [], root / "runs")], run, lambda text: None)
    return path, found, ran, failed, run


def test_what_the_points_leave_alone_runs_once(swept):
    _, found, ran, failed, _ = swept
    assert failed == {}
    assert ran == [(found[0].recipe.name, "base"), (found[0].recipe.name, "teacher"), (found[1].recipe.name, "teacher")]
    assert found[1].stages[0].directory.resolve() == found[0].stages[0].directory
    assert all(stage.finished() for point in found for stage in point.stages)


def test_a_sweep_that_is_started_again_runs_only_what_is_missing(swept):
    path, found, ran, _, run = swept
    ran.clear()
    shutil.rmtree(found[1].stages[1].directory)
    again = points(path, "train.learning_rate=1e-3,1e-2")
    run_points(again, [load_recipe(path, [], path.parent / "runs")], run, lambda text: None)
    assert ran == [(found[1].recipe.name, "teacher")]


def test_the_table_is_sorted_by_the_validation_metric_with_its_interval(swept, tmp_path):
    _, found, _, _, _ = swept
    rows = table_of(found, {})
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    best = read_stage(next(point for point in found if point.recipe.name == rows[0]["run"]).stages[-1].directory)
    assert rows[0]["value"] == best["metrics"]["validation"]["accuracy"]
    assert rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"]
    assert rows[0]["low"] < rows[0]["high"]
    text = show(rows)
    assert "validation accuracy" in text
    assert f"best: --set teacher.train.learning_rate={rows[0]['teacher.train.learning_rate']}" in text
    table, page = write_table(tmp_path, "tiny: sweep", rows)
    with table.open(newline="") as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == values
    html = page.read_text()
    assert "<svg" in html
    assert found[0].recipe.name in html
    json.dumps(rows)


def test_a_point_that_fails_is_told_and_the_others_go_on(tmp_path):
    found = points(write_recipe(tmp_path), "train.steps=2,3")

    def run(point):
        if point.stages[-1].config.train.steps == 2:
            raise StageError(1, "stage 'teacher' crashed")

    failed = run_points(found, [], run, lambda text: None)
    assert failed == {"tiny-steps-2": "stage 'teacher' crashed"}
    rows = table_of(found, failed)
    assert [row["state"] for row in rows] == ["stage 'teacher' crashed", "not run"]
    assert "crashed" in show(rows)
    write_table(tmp_path / "out", "x", rows)


def test_a_sweep_that_is_asked_to_stop_stops(tmp_path):
    ran = []

    def run(point):
        ran.append(point)
        raise StageError(PREEMPTED, "asked to stop")

    with pytest.raises(StageError, match="asked to stop"):
        run_points(points(write_recipe(tmp_path), "train.steps=2,3"), [], run, lambda text: None)
    assert len(ran) == 1


def test_a_point_with_several_seeds_counts_by_their_mean(tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(seeds=[1, 2])}})
    found = points(path, "train.steps=2,3")
    assert [stage.name for stage in found[0].stages] == ["teacher-seed1", "teacher-seed2", "teacher"]
    for point, mean, best in zip(found, (70.0, 80.0), (95.0, 81.0), strict=True):
        spread = {"validation": {"accuracy": {"mean": mean, "sd": 5.0}}}
        metrics = {"validation": {"accuracy": best, "examples": 100}}
        facts = {"metrics": metrics, "spread": spread, "models": {"a": {}, "b": {}}, "seconds": {"this_run": 1.0}}
        write_stage(point.recipe.runs / point.recipe.name, "teacher", "select", **facts)
    rows = table_of(found, {})
    assert [(row["value"], row["low"], row["high"], row["ends"]) for row in rows] == [
        (80.0, 75.0, 85.0, "sd of 2"),
        (70.0, 65.0, 75.0, "sd of 2"),
    ]
    assert "75 to 85 (sd of 2)" in show(rows)
