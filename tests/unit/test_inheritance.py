"""Say it once: `task`, `data` and `max_length` come from the stage whose model is read."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.errors import UserError
from engine.inheritance import INHERITED, inherit
from launch.check import check_recipe
from launch.cli import main
from launch.points import expand_sweep
from launch.recipe import load_stages
from launch.show import show_recipe
from tests.recipes import finetune_section, pretrain_section, train_section, write_recipe

SHORT = {
    "base": {"pretrain": pretrain_section()},
    "teacher": {"finetune": finetune_section(model="base")},
    "student": {"distill": {"teacher": "teacher", "student": {"layers": 1}, "train": train_section()}},
    "slim": {"prune": {"model": "student", "heads": 2}},
    "recovered": {"distill": {"teacher": "teacher", "student": {"model": "slim"}, "train": train_section()}},
    "int8": {"quantize": {"model": "recovered"}},
    "engine": {"export": {"model": "int8", "baseline": "teacher"}},
}
SAID = {key: SHORT["teacher"]["finetune"][key] for key in INHERITED}
WRITTEN_OUT = {
    name: {kind: {**SAID, **section} if kind != "pretrain" else section}
    for name, body in SHORT.items()
    for kind, section in body.items()
}


def load(path, *overrides):
    recipe = load_recipe(path, list(overrides), path.parent / "runs")
    return recipe, load_stages(recipe)


def sections(path, *overrides):
    return {stage.name: stage.config.model_dump(mode="json") for stage in load(path, *overrides)[1]}


def without(section, *keys):
    return {key: value for key, value in section.items() if key not in keys}


def refused(path, *overrides):
    with pytest.raises(UserError) as error:
        load(path, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_chain_that_says_it_once_is_the_chain_that_says_it_in_every_stage(tmp_path):
    assert sections(write_recipe(tmp_path, SHORT)) == sections(write_recipe(tmp_path, WRITTEN_OUT))


def test_what_is_inherited_counts_in_the_fingerprint(tmp_path):
    written_out = write_recipe(tmp_path, {"slim": {"prune": {"model": "model", **SAID, "heads": 2}}})
    (tmp_path / "model/stage.json").write_text(json.dumps({"section": SAID}))
    (expected,) = load(written_out)[1]
    (stage,) = load(write_recipe(tmp_path, {"slim": {"prune": {"model": "model", "heads": 2}}}))[1]
    assert stage.fingerprint == expected.fingerprint
    stage = load(tmp_path / "recipe.yaml", "slim.max_length=16")[1][0]
    assert stage.fingerprint != expected.fingerprint


@pytest.mark.parametrize("key", ["max_length=48", "data.validation=10%", "task.names={0: bad, 1: good}"])
def test_an_override_or_a_sweep_of_the_source_reaches_every_stage_that_inherits(tmp_path, key):
    path = write_recipe(tmp_path, SHORT)
    name = key.partition("=")[0].partition(".")[0]
    (variant,) = expand_sweep([f"teacher.{key}"])
    changed = sections(path, *variant.overrides)
    assert changed["teacher"][name] != sections(path)["teacher"][name]
    assert {stage: section[name] for stage, section in changed.items() if stage != "base"} == dict.fromkeys(
        list(SHORT)[1:], changed["teacher"][name]
    )


def test_a_stage_may_say_otherwise_and_passes_that_on(tmp_path):
    path = write_recipe(tmp_path, SHORT)
    lengths = {name: section.get("max_length") for name, section in sections(path, "slim.max_length=24").items()}
    assert lengths == {"base": None, "slim": 24, **dict.fromkeys(["teacher", "student", "recovered", "int8", "engine"], 32)}
    changed = sections(path, "recovered.data={train: rows.jsonl, validation: 30%}")
    assert changed["engine"]["data"] == changed["int8"]["data"] == changed["recovered"]["data"] != changed["teacher"]["data"]
    assert changed["recovered"]["data"]["test"] is None  # nothing of the inherited one is mixed in


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.teacher=owner/name"], "task: field required and nothing can be inherited: model 'owner/name' is no stage"),
        (["student.teacher=model"], "model 'model' is no stage of this recipe and no directory with the stage.json of a stage"),
        (
            ["student.teacher=base"],
            "student.distill.task: field required and nothing can be inherited: stage 'base' (pretrain)",
        ),
        (["student.teacher=slim"], "nothing can be inherited: stage 'slim' comes later: move it up"),
        (["student.teacher=student"], "nothing can be inherited: a stage cannot read itself"),
        (["slim.data.validation=10%"], "say all of it here, or change it in stage 'teacher'"),
        (["slim.task.text=body"], "('task' is inherited as a whole or not at all: say all of it here"),
    ],
)
def test_where_nothing_can_be_inherited_the_line_says_which_key_is_missing_and_why(tmp_path, overrides, message):
    said = refused(write_recipe(tmp_path, SHORT), *overrides)
    assert message in said
    assert "recipe.yaml:" in said


def test_a_fine_tuning_that_lacks_its_task_is_told_that_pretraining_has_none(tmp_path):
    for key in ("task", "data"):
        stages = {**SHORT, "teacher": {"finetune": without(SHORT["teacher"]["finetune"], key)}}
        said = refused(write_recipe(tmp_path, stages))
        assert f"teacher.finetune.{key}: field required and nothing can be inherited: stage 'base' (pretrain) has none" in said


def test_a_model_directory_of_an_earlier_run_passes_on_what_its_record_says(tmp_path):
    path = write_recipe(tmp_path, {"int8": {"quantize": {"model": "model"}}})
    for broken in ("{", "[]", '{"section": 1}', '{"section": {"data": {"train": "rows.jsonl"}}}'):
        (tmp_path / "model/stage.json").write_text(broken)
        assert "nothing can be inherited: model 'model'" in refused(path)
    recorded = load(write_recipe(tmp_path, {"teacher": {"finetune": finetune_section()}}))[1][0].config.model_dump(mode="json")
    (tmp_path / "model/stage.json").write_text(json.dumps({"section": recorded}))
    path = write_recipe(tmp_path, {"int8": {"quantize": {"model": "model"}}})
    recipe, stages = load(path)
    check_recipe(recipe, stages)
    assert {key: sections(path)["int8"][key] for key in INHERITED} == {key: recorded[key] for key in INHERITED}
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"rows.jsonl: no such file .*\('data' is inherited from model/stage.json\)"):
        check_recipe(recipe, stages)


def test_the_recipe_that_is_shown_is_a_recipe_of_the_same_work(tmp_path):
    overrides = ["seed=7", "teacher.train.learning_rate=1e-5", "student.transfer={path: rows.jsonl, where: {text: '1e5'}}"]
    path = write_recipe(tmp_path, SHORT)
    shown = show_recipe(*load(path, *overrides))
    (tmp_path / "shown.yaml").write_text(shown)
    again, before = load(tmp_path / "shown.yaml"), load(path, *overrides)
    assert sections(tmp_path / "shown.yaml") == sections(path, *overrides)
    assert (again[0].name, again[0].seed) == (before[0].name, 7)
    assert shown.count("# inherited from stage 'teacher'") == 5 * len(INHERITED)
    assert "stages" in yaml.safe_load(shown)
    assert show_recipe(*again).count("# inherited") == 0


def test_check_prints_the_recipe_and_nothing_else(tmp_path, capsys):
    path = write_recipe(tmp_path, SHORT)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(path), "--show", "--set", "teacher.max_length=24"])
    assert not stop.value.code
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert sections(tmp_path / "shown.yaml") == sections(path, "teacher.max_length=24")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["model", "teacher", "other"]),
            st.sampled_from(["a", "b", "c", "d", "elsewhere"]),
            st.dictionaries(st.sampled_from(INHERITED), st.integers(0, 9)),
        ),
        max_size=4,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_value_is_always_that_of_the_stage_that_is_said_to_say_it(chain):
    stages = {name: ("kind", {key: reference, **said}) for name, (key, reference, said) in zip("abcd", chain, strict=False)}
    for name, inheritance in inherit(stages, lambda reference: None).items():
        for key, value in inheritance.values.items():
            origin = inheritance.origins[key].stage
            assert stages[origin][1][key] == value
            assert list(stages).index(origin) < list(stages).index(name)
            assert key not in stages[name][1]


def test_yaml_anchors_stay_legal(tmp_path):
    write_recipe(tmp_path)
    (tmp_path / "anchors.yaml").write_text(
        """\
stages:
  teacher:
    finetune:
      model: model
      task: &task {type: classification}
      data: &data {train: rows.jsonl}
      train: &train {steps: 2, batch_size: 8, learning_rate: 1e-3}
  student: {distill: {teacher: teacher, task: *task, data: {<<: *data, validation: 20%}, train: *train}}
"""
    )
    found = sections(tmp_path / "anchors.yaml")
    assert found["student"]["task"] == found["teacher"]["task"]
    assert (found["teacher"]["data"]["validation"], found["student"]["data"]["validation"]) == (0.1, 0.2)
