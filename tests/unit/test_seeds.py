"""Several seeds of one stage: each a stage of its own, the best one handed on, with mean and spread of all."""

import statistics

import pytest
import yaml

from engine.config import load_recipe
from engine.errors import UserError
from engine.select import best_of, spread
from engine.stages.stage import lineage, read_stage
from export.report.figures import read_run, replay_recipe
from launch import resume_check
from launch.check import check_recipe
from launch.pipeline import choose_stages, summary
from launch.planning.plan import plan_recipe
from launch.recipe import load_stages
from launch.show import show_recipe
from launch.slurm.script import BatchOptions
from launch.slurm.submit import prepare_submission
from tests.recipes import finetune_section, read_weights, run_here, train_section, write_recipe

SEEDED = {"teacher": {"finetune": finetune_section(seeds=[3, 5])}, "int8": {"quantize": {"model": "teacher"}}}


def stages_of(path, *overrides, runs="runs"):
    return load_stages(load_recipe(path, list(overrides), runs))


def test_a_stage_with_seeds_is_one_stage_a_seed_and_one_that_selects(tmp_path):
    stages = stages_of(write_recipe(tmp_path, SEEDED))
    assert [(stage.name, stage.kind, stage.seed) for stage in stages] == [
        ("teacher-seed3", "finetune", 3),
        ("teacher-seed5", "finetune", 5),
        ("teacher", "select", 0),
        ("int8", "quantize", 0),
    ]
    first, second, select, int8 = stages
    assert first.config.model_copy(update={"seed": 5}) == second.config
    assert select.upstream() == ["teacher-seed3", "teacher-seed5"]
    assert int8.config.task == first.config.task, "what follows inherits through the selection"


def test_a_number_of_seeds_counts_from_that_of_the_recipe(tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(seeds=3)}})
    assert [stage.seed for stage in stages_of(path, "seed=7")][:3] == [7, 8, 9]


def test_a_seed_of_a_stage_overrules_that_of_the_recipe_and_another_is_other_work(tmp_path):
    path = write_recipe(tmp_path)
    (plain,), (own,), (same,) = stages_of(path), stages_of(path, "teacher.seed=4"), stages_of(path, "seed=4")
    assert (plain.seed, own.seed, same.seed) == (0, 4, 4)
    assert len({stage.fingerprint for stage in (plain, own, same)}) == 3


def test_settings_of_the_stage_reach_every_seed_and_its_name_means_all_of_them(tmp_path):
    path = write_recipe(tmp_path, SEEDED)
    stages = stages_of(path, "teacher.train.steps=4")
    assert [stage.config.train.steps for stage in stages[:2]] == [4, 4]
    assert [stage.name for stage in choose_stages(stages, ["teacher"])] == ["teacher-seed3", "teacher-seed5", "teacher"]
    assert [stage.name for stage in choose_stages(stages, ["teacher-seed5"])] == ["teacher-seed5"]


def test_a_longer_list_of_seeds_leaves_the_work_of_the_others_as_it_is(tmp_path):
    path = write_recipe(tmp_path, SEEDED)
    before, after = ({s.name: s.fingerprint for s in stages_of(path, f"teacher.seeds={v}")[:2]} for v in ("[3, 5]", "[3, 5, 6]"))
    assert before == after


def test_check_and_show_write_the_seeds_out_and_the_shown_recipe_is_the_same_work(tmp_path):
    path = write_recipe(tmp_path, SEEDED)
    recipe = load_recipe(path)
    stages = load_stages(recipe)
    assert check_recipe(recipe, stages)["teacher"] == "reads teacher-seed3, teacher-seed5"
    (tmp_path / "shown.yaml").write_text(show_recipe(recipe, stages))
    assert [s.fingerprint for s in stages_of(tmp_path / "shown.yaml")[:2]] == [s.fingerprint for s in stages[:2]]


def test_memory_is_planned_once_for_all_seeds(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, SEEDED))
    assert [plan.name for plan, _ in plan_recipe(recipe, load_stages(recipe), 1, "8GB")] == ["teacher-seed3"]


def test_every_seed_is_a_job_of_its_own_on_slurm(tmp_path):
    path = write_recipe(tmp_path, SEEDED)
    submission = prepare_submission(path, [], tmp_path / "runs", [], BatchOptions(), [])
    assert [stage.name for stage in submission.stages] == ["teacher-seed3", "teacher-seed5", "teacher", "int8"]
    assert all(f"--stage {stage.name}" in text for stage, text in submission.scripts())


def test_resume_is_proved_with_the_first_seed_and_settings_that_reach_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(resume_check, "_trials", lambda place, *rest: seen.append(place) or [])
    resume_check.resume_check(write_recipe(tmp_path, SEEDED), [], tmp_path / "runs", "teacher", 10, 0, lambda text: None)
    (place,) = seen
    assert place.stage.name == "teacher-seed3"
    assert "teacher.train.steps=10" in place.settings
    assert load_stages(load_recipe(place.path, place.settings))[0].config.train.steps == 10


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"teacher": {"finetune": finetune_section(seeds=[1])}}, "seeds must be two or more different whole numbers"),
        ({"teacher": {"finetune": finetune_section(seeds=[1, 1])}}, r"two or more different .* not \[1, 1\]"),
        ({"teacher": {"finetune": finetune_section(seeds=["a", "b"])}}, "two or more different"),
        ({"teacher": {"finetune": finetune_section(seeds=1)}}, "two or more different"),
        ({"teacher": {"finetune": finetune_section(seeds=[1, 2], seed=3)}}, "seed and seeds: say one of them"),
        (
            {"teacher-seed1": {"finetune": finetune_section()}, "teacher": {"finetune": finetune_section(seeds=[1, 2])}},
            "would make a stage 'teacher-seed1', which is there already",
        ),
        (
            {"a": {"finetune": finetune_section()}, "b": {"quantize": {"model": "a", "seeds": 2}}},
            "only stages that",
        ),
        ({"teacher": {"finetune": finetune_section(seeds=[1, 2], epochs=3)}}, "unknown key 'epochs'"),
    ],
)
def test_seeds_that_make_no_sense_are_one_line_that_names_the_line_of_the_recipe(tmp_path, stages, message):
    path = write_recipe(tmp_path, stages)
    with pytest.raises(UserError, match=message) as error:
        stages_of(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    line = int(str(error.value).split(":")[1])
    assert any(word in path.read_text().splitlines()[line - 1] for word in ("seed", "epochs"))


def record(value, metric="accuracy", higher=True, **more):
    named = {"name": metric, "higher_is_better": higher, "unit": "%", "counted": True}
    return {"metric": named, "metrics": {"validation": {metric: value, "examples": 10}, **more}}


def test_the_best_on_the_validation_rows_is_taken_whichever_way_the_metric_goes():
    records = {"a": record(80.0, test={"accuracy": 99.0}), "b": record(90.0, test={"accuracy": 1.0}), "c": record(90.0)}
    assert best_of(records) == "b"
    assert best_of({"a": record(0.3, "rmse", False), "b": record(0.2, "rmse", False)}) == "b"
    with pytest.raises(UserError, match="'b' is judged by f1, 'a' by accuracy"):
        best_of({"a": record(1.0), "b": record(1.0, "f1")})


def test_the_spread_is_mean_and_sample_deviation_of_every_figure():
    values = [80.0, 90.0, 91.0]
    found = spread({str(value): record(value, test={"accuracy": value + 1, "examples": 10}) for value in values})
    assert found["validation"] == {"accuracy": {"mean": statistics.mean(values), "sd": statistics.stdev(values)}}
    assert found["test"]["accuracy"]["mean"] == statistics.mean(values) + 1


def test_seeds_are_trained_compared_and_the_best_is_handed_on(tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(seeds=[3, 5], train=train_section(steps=4))}})
    runs = tmp_path / "runs"
    for name in ("teacher-seed3", "teacher-seed5", "teacher"):
        done = run_here(path, name, runs)
        assert done.finished()
    records = {name: read_stage(runs / "tiny" / name) for name in ("teacher-seed3", "teacher-seed5", "teacher")}
    made = records["teacher"]
    assert made["chosen"] == best_of({name: records[name] for name in ("teacher-seed3", "teacher-seed5")})
    own, chosen = read_weights(runs / "tiny" / "teacher"), read_weights(runs / "tiny" / made["chosen"])
    assert all((own[name] == chosen[name]).all() for name in chosen)
    different = [read_weights(runs / "tiny" / name) for name in ("teacher-seed3", "teacher-seed5")]
    assert any((different[0][name] != different[1][name]).any() for name in own)
    assert made["metrics"] == records[made["chosen"]]["metrics"]
    assert made["models"]["teacher-seed5"] == {"seed": 5, "metrics": records["teacher-seed5"]["metrics"]}
    losses = [records[name]["metrics"]["test"]["loss"] for name in ("teacher-seed3", "teacher-seed5")]
    assert made["spread"]["test"]["loss"] == {"mean": statistics.fmean(losses), "sd": statistics.stdev(losses)}
    assert [directory.name for directory in lineage(runs / "tiny" / "teacher")] == ["teacher", made["chosen"]]
    run = read_run(runs / "tiny")
    assert run.chain() == [made["chosen"], "teacher"]
    again = yaml.safe_load(replay_recipe(run))
    assert [again["stages"][name]["finetune"]["seed"] for name in ("teacher-seed3", "teacher-seed5")] == [3, 5]
    (tmp_path / "again.yaml").write_text(replay_recipe(run))
    assert [stage.name for stage in stages_of(tmp_path / "again.yaml")] == list(again["stages"])
    table = summary(stages_of(path, runs=runs), ["teacher"])
    assert any(" ± " in cell for cell in table.columns[-1]._cells)
    assert made["files"].keys() >= {"model.safetensors", "predictions.jsonl", "mistakes.json"}
