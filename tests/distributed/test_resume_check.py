"""`bothways resume-check` proves exact resume on the user's own recipe, and sees a single wrong bit."""

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file, save_file

from launch import resume_check as module
from launch.resume_check import differences
from tests.distributed.conftest import ROOT
from tests.recipes import run_here


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    return run_here(recipe, "teacher", tmp_path_factory.mktemp("finished")).directory


def test_two_equal_directories_have_no_difference(finished, tmp_path):
    assert list(differences(shutil.copytree(finished, tmp_path / "copy"), finished)) == []


def test_one_bit_of_one_weight_is_seen(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "copy")
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    flat = weights[name].view(-1)
    flat[0] = flat[0].nextafter(flat.new_tensor(9.0)) if hasattr(flat[0], "nextafter") else flat[0] + 1e-7
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert next(differences(other, finished)).startswith(f"tensor {name} differs by up to ")


def test_another_loss_at_one_step_is_seen(finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "copy")
    records = [json.loads(line) for line in (other / "history.jsonl").read_text().splitlines()]
    changed = next(record for record in records if record.get("validation") and record["step"] == 4)
    changed["validation"]["loss"] += 1e-12
    (other / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert next(differences(other, finished)).startswith("the history differs at step 4: ")


def check(recipe, runs, *arguments):
    command = [sys.executable, "-m", "launch.cli", "resume-check", str(recipe), "--runs", str(runs), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [("--stage", "teacher"), ("--set", "base.processes=2", "--set", "base.parallel=zero2")])
def test_a_stage_is_trained_killed_stopped_resumed_and_compared(recipe, tmp_path, spread):
    done = check(recipe, tmp_path / "runs", *spread, "--steps", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resumed: bit-equal weights, losses and metrics") == 2
    assert done.stdout.endswith("verdict: resume is bit-exact\n")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_stage_that_does_not_train_cannot_be_checked(recipe, tmp_path):
    done = check(recipe, tmp_path / "runs", "--stage", "base2")
    assert done.returncode == 2
    assert "no stage that trains is named 'base2': did you mean 'base'?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_check_that_is_ended_leaves_no_run_behind(recipe, tmp_path, number):
    command = [sys.executable, "-m", "launch.cli", "resume-check", str(recipe), "--runs", str(tmp_path / "runs")]
    with (tmp_path / "log").open("w") as log:
        # A shell's background jobs ignore SIGINT, and so would what they start.
        process = subprocess.Popen(
            [*command, "--steps", "2000"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        started = []
        give_up = time.monotonic() + 60
        while not any("--stage" in child.cmdline() and "launch.cli" not in child.cmdline() for child in started):
            assert time.monotonic() < give_up and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
            started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number == signal.SIGINT else -number)
        assert psutil.wait_procs(started, timeout=10)[1] == []
        if number == signal.SIGINT:
            assert list((tmp_path / "runs").iterdir()) == []
    finally:
        process.kill()


def test_an_interrupted_check_ends_its_run_before_it_removes_the_scratch_directory(recipe, tmp_path, monkeypatch):
    children = []

    def interrupted(place, *rest):
        children.append(place.start("whole"))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_trials", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.resume_check(recipe, [], tmp_path / "runs", "base", 20, 0, print)
    assert children[0].process.returncode == -signal.SIGKILL
    assert list((tmp_path / "runs").iterdir()) == []
