"""Two network namespaces as two hosts: the same losses as on one, and verdicts when a node, a rank or the link is lost."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import namespaces
from benchmarks.namespaces import HOSTS, Hosts, TwoNodes
from engine.errors import NODE_FAILED, PREEMPTED
from engine.stages.stage import hash_directory
from tests.distributed.conftest import TWO
from tests.distributed.test_kill import assert_bit_equal
from tests.recipes import (
    corpus_section,
    pretrain_section,
    ragged_rows,
    read_history,
    run_here,
    train_section,
    write_recipe,
    write_rows,
)

CLOSE = 1e-5
LONG = ("--set", "base.train.steps=1000000", "--set", "base.train.evaluate_every=100000", "--set", "base.parallel=zero2")
"""A training that does not end by itself."""
FAR = 300
"""A step by which the launchers have told each other about training."""


@pytest.fixture(scope="module")
def hosts():
    reason = namespaces.missing()
    if reason:
        pytest.skip(reason)
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def launch(hosts, recipe, tmp_path):
    """Starts `bothways launch` on both hosts; what still runs at the end of the test is ended."""
    started = []

    def launch(*arguments, program=namespaces.PROGRAM, recipe=recipe, runs=tmp_path / "runs"):
        started.append(TwoNodes(hosts, recipe, runs, *arguments, program=program))
        return started[-1]

    yield launch
    hosts.link(up=True)
    for run in started:
        run.end()


def succeed(run):
    for host in HOSTS:
        assert run.wait(host) == 0, run.output(host, "out") + run.output(host, "err")
    return run.runs / "tiny" / "base"


def losses(directory):
    records = read_history(directory)
    return np.asarray([value for r in records for value in (r.get("loss"), r.get("validation", {}).get("loss")) if value])


@pytest.fixture(scope="module")
def undisturbed(hosts, recipe, tmp_path_factory):
    """The stage after an uninterrupted ZeRO-2 run on two nodes."""
    runs = tmp_path_factory.mktemp("two_nodes") / "runs"
    return succeed(TwoNodes(hosts, recipe, runs, "--stage", "base", *TWO["zero2"]))


def test_zero2_on_two_nodes_has_the_losses_of_one_host(undisturbed, zero2):
    np.testing.assert_allclose(losses(undisturbed), losses(zero2), rtol=0, atol=CLOSE)


def test_two_nodes_make_a_corpus_and_train_on_it(launch, tmp_path):
    write_rows(tmp_path / "more.jsonl", ragged_rows(64, seed=1))
    text = corpus_section(data={"train": ["rows.jsonl", "more.jsonl"], "validation": "25%"}, shard_tokens=1)
    section = pretrain_section(corpus="text", data=None, tokenizer=None, train=train_section(steps=2), parallel="zero2")
    recipe = write_recipe(tmp_path, {"text": {"corpus": text}, "base": {"pretrain": section}})
    run = launch(recipe=recipe)
    made = succeed(run)
    assert "files: 2, read in 2 parts by 2 processes" in run.output(HOSTS[0], "out")
    whole = run_here(recipe, "text", tmp_path / "alone").directory
    assert hash_directory(made.with_name("text") / "corpus") == hash_directory(whole / "corpus")


@pytest.mark.slow
def test_zero3_on_two_nodes_has_the_losses_of_one_host(launch, zero3):
    directory = succeed(launch("--stage", "base", *TWO["zero3"]))
    np.testing.assert_allclose(losses(directory), losses(zero3), rtol=0, atol=CLOSE)


def test_a_killed_node_is_noticed_by_the_other_one_within_15_seconds(hosts, launch):
    run = launch("--stage", "base", *LONG, "--heartbeat-limit", "60")
    run.when_training(FAR)
    hosts.kill("b")
    began = time.monotonic()
    assert run.wait("a") == NODE_FAILED
    assert time.monotonic() - began < 15
    said = run.output("a", "err").splitlines()[-1]
    assert said.startswith("error: stage 'base': node b (rank 1): no heartbeat for ")
    assert " at step " in said
    assert said.endswith(": the node or its link is gone")


@pytest.mark.slow
def test_a_cut_link_is_noticed_on_both_sides_within_the_heartbeat_limit_and_10_seconds(hosts, launch):
    run = launch("--stage", "base", *LONG, "--heartbeat-limit", "10")
    run.when_training(FAR)
    hosts.link(up=False)
    began = time.monotonic()
    assert [run.wait(host) for host in HOSTS] == [NODE_FAILED, NODE_FAILED]
    assert time.monotonic() - began < 20
    assert "error: stage 'base': node b (rank 1): no heartbeat for 10 s, last in " in run.output("a", "err")
    assert "error: stage 'base': node a (rank 0): no heartbeat for 10 s, last in " in run.output("b", "err")


@pytest.mark.slow
def test_a_killed_rank_is_started_again_on_both_nodes_and_the_weights_are_those_of_an_undisturbed_run(launch, undisturbed):
    run = launch("--stage", "base", *TWO["zero2"], "--max-restarts", "1")
    run.when_training(5)
    os.kill(run.pid(1), signal.SIGKILL)
    assert_bit_equal(succeed(run), undisturbed)
    assert "restart 1 of 1: process 1 on node b of stage 'base' was killed" in run.output("a")


@pytest.mark.slow
@pytest.mark.parametrize("lost", HOSTS)
def test_a_killed_node_that_is_launched_again_joins_and_the_weights_are_those_of_an_undisturbed_run(
    hosts, launch, undisturbed, lost
):
    run = launch("--stage", "base", *TWO["zero2"], "--max-restarts", "1", "--heartbeat-limit", "10")
    run.when_training(5)
    hosts.kill(lost)
    run.processes[lost].wait()
    run.start(lost)
    assert_bit_equal(succeed(run), undisturbed)


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_with_its_node(launch):
    run = launch("--stage", "base", *LONG, "--heartbeat-limit", "5")
    run.when_training(5)
    os.kill(run.pid(1), signal.SIGSTOP)
    assert [run.wait(host) for host in HOSTS] == [1, 1]
    for host in HOSTS:
        assert "error: stage 'base': rank 1 on node b: no progress for " in run.output(host, "err")
        assert "(the process is stopped)" in run.output(host, "err")


@pytest.mark.slow
def test_sigterm_to_one_launcher_stops_both_nodes_with_a_checkpoint(launch):
    run = launch("--stage", "base", *LONG)
    run.when_training(5)
    subprocess.run(["kill", "-TERM", str(run.processes["b"].pid)], check=True)
    assert [run.wait(host) for host in HOSTS] == [PREEMPTED, PREEMPTED]
    assert "asked to stop: checkpoint of step " in run.output("a")


CRASHING = """\
import launch.cli, launch.recipe
kinds = launch.recipe.KINDS
kinds["finetune"] = kinds["finetune"]._replace(module="tests.distributed.crashing")
launch.cli.main()
"""


@pytest.mark.slow
def test_the_traceback_of_the_rank_that_failed_is_shown_by_node_0_wherever_it_ran(launch, monkeypatch):
    monkeypatch.setenv("FAIL", "crash")
    run = launch("--stage", "teacher", "--set", "teacher.parallel=zero2", program=("-c", CRASHING))
    assert [run.wait(host) for host in HOSTS] == [1, 1]
    last = "error: stage 'teacher' crashed in process 1 on node b: ZeroDivisionError: rank 1 divides by zero"
    assert [run.output(host, "err").splitlines()[-1] for host in HOSTS] == [last, last]
    assert run.output("a", "err").count("Traceback") == 1
    assert "crashing.py" in run.output("a", "err")


@pytest.mark.slow
def test_one_command_starts_all_nodes_and_stops_them_with_a_checkpoint(hosts, recipe, tmp_path):
    shell = tmp_path / "shell"
    shell.write_text(f'#!/bin/sh\nhost=$1; shift\nexec ip netns exec {hosts.prefix}$host unshare --uts "$@"\n')
    shell.chmod(0o755)
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "launch.cli",
                "launch",
                str(recipe),
                "--runs",
                str(tmp_path / "runs"),
                "--stage",
                "base",
                *LONG,
            ),
            *("--hosts", "a,b", "--shell", f"{shell} {{host}}", "--main-address", hosts.address),
        ],
        cwd=namespaces.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    line = ""
    while "step 10/" not in line:
        line = process.stdout.readline()
        assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert process.returncode == PREEMPTED, err
    assert "a:   asked to stop: checkpoint of step " in out


@pytest.mark.slow
def test_nodes_that_were_started_with_different_options_end_with_one_line(launch, hosts, recipe, tmp_path):
    run = launch("--stage", "base", *LONG)
    run.hosts.kill("b")
    run.processes["b"].wait()
    run.arguments = (*run.arguments, "--set", "base.train.batch_size=16")
    run.start("b")
    assert [run.wait(host) for host in HOSTS] == [2, 2]
    assert (
        run.output("a", "err")
        .splitlines()[-1]
        .startswith("error: node 1 (b) was started with another recipe or other options than node 0")
    )
