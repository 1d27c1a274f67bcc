"""Recipes: strict keys with suggestions and line numbers, overrides, references."""

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import Fraction, Strict, load_recipe, package_path, references
from engine.errors import UserError, did_you_mean
from engine.finetune import FinetuneConfig
from engine.pretrain import PretrainConfig

TEXT = """\
name: tiny
seed: 3
stages:
  base:
    pretrain:
      model: {layers: 2, hidden: 32, heads: 4}
      tokenizer: words
      data: {train: rows.jsonl}
      train: {steps: 6}
  teacher:
    finetune:
      model: base
      task: {type: classification}
      data:
        train: rows.jsonl
        validation: 10%
      max_length: 64
      train:
        epochs: 1
        learning_rate: 5e-5
        warmup: 6%
"""


def recipe(directory: Path, text: str = TEXT, *overrides: str):
    path = directory / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, list(overrides))


def line_of(text: str, key: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{key}:"))


def test_a_recipe_gives_its_name_seed_and_sections(tmp_path):
    loaded = recipe(tmp_path)
    assert (loaded.name, loaded.seed, list(loaded.stages)) == ("tiny", 3, ["base", "teacher"])
    section = loaded.section("teacher", FinetuneConfig)
    assert section.train.learning_rate == 5e-5
    assert section.train.warmup == pytest.approx(0.06)
    assert section.data.validation == pytest.approx(0.1)
    assert loaded.directory("teacher") == Path("runs/tiny/teacher")


@given(
    key=st.sampled_from(["validation", "max_length", "learning_rate", "warmup", "epochs"]),
    place=st.integers(0, 4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_misspelt_key_is_named_with_its_line_and_the_right_spelling(tmp_path, key, place):
    wrong = key[:place] + key[place + 1 :]
    text = TEXT.replace(f"  {key}: ", f"  {wrong}: ")
    with pytest.raises(UserError) as error:
        recipe(tmp_path, text).section("teacher", FinetuneConfig)
    message = str(error.value)
    assert f"recipe.yaml:{line_of(text, wrong)}: " in message
    assert f"unknown key '{wrong}': did you mean '{key}'?" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("seed: 3", "sed: 3", 2, "unknown key 'sed': did you mean 'seed'?"),
        ("seed: 3", "seed: three", 2, "seed must be a whole number"),
        ("seed: 3", "seed: true", 2, "seed must be a whole number"),
        ("name: tiny", "name: ../tiny", 1, "it names a directory"),
        ("  teacher:", "  teach er:", 10, "stage name 'teach er' must be letters"),
        ("  teacher:", "  jobs:", 10, "no stage can be called 'jobs'"),
        ("    finetune:", "    finetune: {}\n    distill:", 10, "must hold exactly one kind"),
        ("        epochs: 1", "        epochs: 1\n        epochs: 2", 20, "key 'epochs' is given twice"),
        ("      train: {steps: 6}", "      train: {steps: 6", 10, "not valid YAML"),
        ("        epochs: 1\n", "", 18, "give exactly one of train.epochs and train.steps"),
        ("epochs: 1", "epochs: many", 19, "should be a valid number"),
        ("epochs: 1", "epochs: .inf", 19, "should be a finite number"),
        ("warmup: 6%", "warmup: 600%", 21, "less than or equal to 1"),
        ("warmup: 6%", "betas: [0.9, 1.0]", 21, "less than 1"),
        ("type: classification", "type: clasification", 13, "unknown task 'clasification': did you mean 'classification'?"),
        ("validation: 10%", "validation: 0", 11, "data.validation is needed"),
        ("validation: 10%", "validation: 60%\n        test: 60%", 14, "leave nothing to train on"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_that_names_file_and_line(tmp_path, before, after, line, message):
    with pytest.raises(UserError) as error:
        recipe(tmp_path, TEXT.replace(before, after, 1)).section("teacher", FinetuneConfig)
    assert f"{tmp_path / 'recipe.yaml'}:{line}: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_cross_field_errors_name_the_keys_to_change(tmp_path):
    with pytest.raises(UserError, match=r"hidden=30 is not a multiple of heads=4: change one of them"):
        recipe(tmp_path, TEXT, "base.model.hidden=30").section("base", PretrainConfig)
    with pytest.raises(UserError, match=r"sequence_length=600 is above model.positions=512: lower the first or raise the second"):
        recipe(tmp_path, TEXT, "base.sequence_length=600").section("base", PretrainConfig)


@pytest.mark.parametrize("key", ["teacher.train.epochs", "teacher.finetune.train.epochs", "stages.teacher.finetune.train.epochs"])
def test_an_override_may_leave_out_what_is_obvious(tmp_path, key):
    assert recipe(tmp_path, TEXT, f"{key}=2.5").section("teacher", FinetuneConfig).train.epochs == 2.5


@pytest.mark.parametrize("shared", ["train: *same", "train: {<<: *same}", "<<: {train: *same}"])
def test_an_override_changes_one_stage_and_not_those_that_share_its_yaml(tmp_path, shared):
    text = f"""\
stages:
  first: {{finetune: {{train: &same {{epochs: 1, bad_steps: {{limit: 3}}}}}}}}
  second:
    finetune:
      {shared}
"""
    loaded = recipe(tmp_path, text, "second.train.epochs=7", "second.train.bad_steps.limit=5")
    first, second = (section["train"] for _, section in loaded.stages.values())
    assert first == {"epochs": 1, "bad_steps": {"limit": 3}}
    assert second == {"epochs": 7, "bad_steps": {"limit": 5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {x: {? [a, b] : 1}}", ":1: not valid YAML: a key must be a word"),
        ("stages: &a {x: *a}", "not valid YAML"),
        ("seed: !!int x", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        recipe(tmp_path, text)
    assert message in str(error.value)


def test_keys_and_dates_are_text(tmp_path):
    loaded = recipe(tmp_path, "stages: {12: {finetune: {text: 2024-13-45}}}", "12.label=2024-01-01")
    assert loaded.stages == {"12": ("finetune", {"text": "2024-13-45", "label": "2024-01-01"})}


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path):
    loaded = recipe(
        tmp_path, TEXT, "seed=1", "seed=7", "teacher.train.early_stopping={patience: 4}", "teacher.train.dropout=null"
    )
    assert loaded.seed == 7
    train = loaded.section("teacher", FinetuneConfig).train
    assert train.early_stopping.patience == 4
    assert train.dropout is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.train.epochs", "write it as key=value"),
        ("=1", "write it as key=value"),
        ("techer.train.epochs=1", "no stage 'techer': did you mean 'teacher'?"),
        ("teacher.train.epochs.x=1", "'epochs' holds a value, not a mapping"),
        ("seed=[1", "the value is not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(tmp_path, override, message):
    with pytest.raises(UserError) as error:
        recipe(tmp_path, TEXT, override)
    assert str(error.value).startswith(f"--set {override}: ")
    assert message in str(error.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_yaml_is_a_recipe_or_a_users_mistake(tmp_path, value):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(UserError):
        load_recipe(path)


@pytest.mark.parametrize(("value", "expected"), [("6%", 0.06), (" 50 %", 0.5), ("100%", 1.0), (0.25, 0.25), ("0.5", 0.5)])
def test_percentages_are_shares(value, expected):
    class Section(Strict):
        share: Fraction

    assert Section(share=value).share == pytest.approx(expected)


def test_references_are_found_with_their_keys(tmp_path):
    section = recipe(tmp_path, TEXT, "teacher.parallel=zero2").section("teacher", FinetuneConfig)
    found = {key: type(reference).__name__ for key, reference in references(section)}
    assert found == {"model": "ModelRef", "data.train.path": "FileRef", "parallel": "ZeroRef"}


def test_files_of_a_package_are_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "shipped_words"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "rows.jsonl").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_path("package:shipped_words/rows.jsonl") == package / "rows.jsonl"
    assert "shipped_words" not in sys.modules
    with pytest.raises(UserError, match=r"'shipped_words' is installed but has no 'other.jsonl'"):
        package_path("package:shipped_words/other.jsonl")
    with pytest.raises(UserError, match=r"no Python package 'no_such_package' is installed"):
        package_path("package:no_such_package/rows.jsonl")


def test_suggestions_are_near_or_the_whole_list():
    assert did_you_mean("epoch", ["epochs", "steps"]) == ": did you mean 'epochs'?"
    assert did_you_mean("zzz", ["b", "a"]) == " (known: a, b)"
