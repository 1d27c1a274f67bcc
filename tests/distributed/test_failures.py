"""What a user sees when a stage fails: the first failing rank's reason, once."""

import subprocess
import sys

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from launch import local
from launch.check import FIRST_LINES
from launch.local import StageError, run_stage
from launch.recipe import KINDS, load_stages
from tests.distributed.conftest import Bothways, succeed
from tests.recipes import ragged_rows, write_recipe, write_rows


def fail(tmp_path, monkeypatch, how):
    monkeypatch.setenv("FAIL", how)
    monkeypatch.setitem(KINDS, "finetune", KINDS["finetune"]._replace(module="tests.distributed.crashing"))
    overrides = ["teacher.parallel=zero2", "teacher.processes=2"]
    recipe = load_recipe(write_recipe(tmp_path), overrides, tmp_path / "runs")
    (stage,) = load_stages(recipe)
    run_stage(stage, overrides, print)


def test_a_crashing_rank_shows_its_traceback_and_not_that_of_the_rank_that_it_took_along(tmp_path, monkeypatch, capfd):
    with pytest.raises(StageError) as error:
        fail(tmp_path, monkeypatch, "crash")
    assert error.value.status == 1
    assert str(error.value) == "stage 'teacher' crashed in process 1: ZeroDivisionError: rank 1 divides by zero"
    assert "crashing.py" in error.value.details
    assert error.value.details.count("Traceback") == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_mistake_that_one_rank_finds_is_the_users_mistake(tmp_path, monkeypatch, capfd):
    with pytest.raises(UserError, match=r"^recipe.yaml:3: rank 1 cannot use this$"):
        fail(tmp_path, monkeypatch, "mistake")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_rank_that_is_killed_is_not_blamed_on_the_one_that_lost_it(tmp_path, monkeypatch):
    with pytest.raises(StageError, match=r"^process 1 of stage 'teacher' was killed: out of memory"):
        fail(tmp_path, monkeypatch, "killed")


def test_a_malformed_line_that_only_the_stage_finds_is_one_line_and_nothing_is_left(tmp_path):
    recipe = write_recipe(tmp_path / "work")
    path = write_rows(tmp_path / "work/rows.jsonl", ragged_rows(FIRST_LINES + 3))
    path.write_text(path.read_text() + "{broken\n")
    status, _, err = Bothways(recipe, tmp_path / "runs").wait()
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {path}:{FIRST_LINES + 4}: not valid JSON")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_pretraining_stage_leaves_nothing_either(tmp_path):
    from tests.recipes import pretrain_section

    section = pretrain_section(tokenizer={"train": {"vocab_size": 120, "documents": 100}})
    recipe = write_recipe(tmp_path / "work", {"base": {"pretrain": section}})
    path = write_rows(tmp_path / "work/rows.jsonl", ragged_rows(FIRST_LINES + 3))
    path.write_text(path.read_text() + "{broken\n")
    status, _, err = Bothways(recipe, tmp_path / "runs").wait()
    assert (status, err.count("\n")) == (2, 1)
    assert not (tmp_path / "runs").exists()


def test_a_launcher_that_cannot_start_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "command", lambda *arguments: [sys.executable, "-c", "raise SystemExit(3)"])
    (stage,) = load_stages(load_recipe(write_recipe(tmp_path), [], tmp_path / "runs"))
    with pytest.raises(StageError, match=r"could not be started \(exit status 3\)"):
        run_stage(stage, [], print)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "overrides", "spread"),
    [
        ([], [], "1 process, no ZeRO"),
        (["--use_deepspeed", "--num_processes", "1"], [], "1 process, no ZeRO"),
        (["--use_deepspeed", "--num_processes", "2"], ["teacher.parallel=zero2"], "2 processes over gloo, zero2"),
        ([], ["teacher.parallel=zero2"], "1 process, zero2"),
        # Flags of the launcher that contradict the recipe change nothing.
        (
            ["--use_deepspeed", "--num_processes", "2", "--mixed_precision", "bf16", "--zero_stage", "3"],
            ["teacher.parallel=zero2"],
            "2 processes over gloo, zero2, accumulation = 1 (global 8 / (micro 4 × ranks 2)), fp32",
        ),
    ],
)
def test_plain_accelerate_launch_runs_a_stage(tmp_path, flags, overrides, spread):
    recipe = write_recipe(tmp_path)
    arguments = [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "engine.finetune"),
            *(str(recipe), "--stage", "teacher", "--runs", str(tmp_path / "runs"), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert spread in done.stdout
    assert (tmp_path / "runs/tiny/teacher/model.safetensors").exists()


ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: DEEPSPEED
deepspeed_config: {gradient_accumulation_steps: 4, zero_stage: 3, deepspeed_config_file: /nonexistent.json}
machine_rank: 1
main_process_ip: 10.0.0.1
main_process_port: 1234
mixed_precision: bf16
num_machines: 2
num_processes: 4
use_cpu: true
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "spread"),
    [
        ((), "1 process, no ZeRO, accumulation = 1 (global 8 / (micro 8 × ranks 1)), fp32"),
        (
            ("--set", "teacher.parallel=zero2", "--set", "teacher.processes=2"),
            "2 processes over gloo, zero2, accumulation = 1 (global 8 / (micro 4 × ranks 2)), fp32",
        ),
    ],
)
def test_what_accelerate_config_has_left_on_the_machine_changes_nothing(tmp_path, monkeypatch, arguments, spread):
    (tmp_path / "cache/accelerate").mkdir(parents=True)
    (tmp_path / "cache/accelerate/default_config.yaml").write_text(ACCELERATE_CONFIG)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert spread in succeed(Bothways(write_recipe(tmp_path), tmp_path / "runs", *arguments))


@pytest.mark.slow
def test_plain_accelerate_launch_with_the_wrong_number_of_processes_says_what_to_type(tmp_path):
    recipe = write_recipe(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "engine.finetune", str(recipe), "--stage", "teacher"),
            *("--runs", str(tmp_path / "runs"), "--set", "teacher.processes=2"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert "error: the recipe asks for processes=2, but 1 were started" in done.stderr
    assert not (tmp_path / "runs").exists()
