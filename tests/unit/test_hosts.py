"""Starting all nodes from one host: command lines, output, and requests to stop that reach every node."""

import os
import shlex
import signal
import sys
import threading

import pytest

from engine.errors import PREEMPTED, UserError
from launch import cli
from launch.nodes import hosts as module
from launch.nodes.hosts import carried, read_hosts, remote_command, run_hosts
from launch.nodes.place import Place
from launch.watchdog import StageError
from tests.recipes import write_recipe

PLACES = [Place(2, rank, "a") for rank in range(2)]
HERE = "env HOST={host}"
"""A shell that stays on this host."""


def test_ssh_gets_one_text_and_other_shells_a_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = f"cd {tmp_path} && python -c 'print(1)'"
    command = ["python", "-c", "print(1)"]
    assert remote_command("ssh -p 22 {host}", "a", command) == ["ssh", "-p", "22", "a", text]
    assert remote_command("ip netns exec {host}", "a", command) == ["ip", "netns", "exec", "a", "sh", "-c", text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a,,b", 1, None), "--hosts a,,b: a name is empty"),
        (("", 1, None), "--hosts : a name is empty"),
        (("a,b", 1, 0), "--hosts starts all nodes from here, --node-rank is for one of them"),
        (("a,b", 3, None), "--nodes 3, but --hosts names 2"),
    ],
)
def test_hosts_that_contradict_the_other_options_are_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        read_hosts(*arguments)
    assert str(error.value).startswith(message)


def test_hosts_are_read_in_their_order():
    assert read_hosts("b, a", 2, None) == ["b", "a"]


@pytest.mark.parametrize(
    ("shell", "message"), [("ssh 'x {host}", "no closing quotation"), ("nosuch {host}", "no program 'nosuch'")]
)
def test_a_shell_that_cannot_run_is_refused(shell, message):
    with pytest.raises(UserError, match=message):
        remote_command(shell, "a", ["true"])


def test_a_shell_without_a_place_for_the_host_is_refused():
    with pytest.raises(UserError, match=r"^--shell 'ssh': write \{host\}"):
        remote_command("ssh", "a", ["true"])


@pytest.fixture
def program(monkeypatch):
    """Makes every node run a Python program that sees its HOST and may be asked to stop."""

    def program(text):
        text = f"import os, signal, sys, time; host = os.environ['HOST']\n{text}"
        monkeypatch.setattr(module, "node_command", lambda arguments, place: [sys.executable, "-c", text])

    return program


def test_what_the_nodes_print_is_shown_with_their_names(program, capfd):
    program("print('out of', host); print('err of', host, file=sys.stderr)")
    run_hosts([], PLACES, ["a", "b"], HERE)
    out, err = capfd.readouterr()
    assert {"a: out of a", "b: out of b"} <= set(out.splitlines())
    assert set(err.splitlines()) == {"a: err of a", "b: err of b"}


def test_a_node_that_fails_gives_the_status(program):
    program("sys.exit(76 if host == 'b' else 0)")
    with pytest.raises(StageError, match=r"^node b ended with status 76$") as error:
        run_hosts([], PLACES, ["a", "b"], HERE)
    assert error.value.status == 76


def test_what_is_said_of_the_network_and_what_is_named_reaches_every_node(program, capfd, monkeypatch):
    for name in [name for name in os.environ if name.startswith(module.CARRIED)]:
        monkeypatch.delenv(name)
    for name, value in {"NCCL_DEBUG": "INFO x", "GLOO_SOCKET_IFNAME": "lo", "TOKEN": "a secret", module.ATTENDED: "1"}.items():
        monkeypatch.setenv(name, value)
    assert carried([]) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "INFO x"}
    names = ("NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "TOKEN")
    program(f"print([os.environ.get(name) for name in {names}])")
    shell = "env -u TOKEN -u NCCL_DEBUG -u GLOO_SOCKET_IFNAME HOST={host}"
    run_hosts([], PLACES, ["a", "b"], shell, ["TOKEN"])
    out = capfd.readouterr().out
    assert out.count("['INFO x', 'lo', 'a secret']") == 2
    shown = [line for line in out.splitlines() if line.startswith("env ")]
    assert len(shown) == 2
    assert all("TOKEN=…" in line and "secret" not in line and "NCCL_DEBUG=INFO x" in line for line in shown)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("TOKEN", raising=False)
    with pytest.raises(UserError, match="--env TOKEN: it is not set here"):
        carried(["TOKEN"])


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--nodes", "1"), "--env carries variables to the nodes of --hosts"), (("--slurm",), "--env: the job takes it from Slurm")],
)
def test_variables_travel_to_hosts_alone(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["launch", str(write_recipe(tmp_path)), *options, "--env", "HOME"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


STOPPABLE = """
from launch.nodes.hosts import attend
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
attend()
print('up', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, 130)])
def test_a_request_to_stop_reaches_every_node(program, capfd, number, status):
    program(STOPPABLE)
    threading.Timer(2.0, signal.raise_signal, (number,)).start()
    with pytest.raises(StageError) as error:
        run_hosts([], PLACES, ["a", "b"], HERE)
    assert error.value.status == status


def test_the_others_do_not_go_on_for_ever_without_a_node_that_failed(program, monkeypatch):
    monkeypatch.setattr(module, "ALONE_SECONDS", 0.5)
    program(f"if host == 'b': sys.exit(2)\n{STOPPABLE}")
    with pytest.raises(StageError) as error:
        run_hosts([], PLACES, ["a", "b"], HERE)
    assert error.value.status == 2


def test_a_dry_run_shows_the_commands_of_all_nodes_and_stages_and_runs_nothing(tmp_path, capfd):
    recipe = write_recipe(tmp_path)
    capfd.readouterr()  # what the libraries say when they are loaded
    arguments = ["launch", recipe, "--hosts", "a,b", "--dry-run", "--set", "teacher.parallel=zero2", "--max-restarts", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, arguments), "--runs", str(tmp_path / "runs")])
    assert not stop.value.code
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("# ") and "  " not in line] == [
        *("# node 0 (a)", "# node 1 (b)", "# stage teacher on node 0", "# stage teacher on node 1")
    ]
    for rank, host in enumerate("ab"):
        words = shlex.split(shlex.split(lines[2 * rank + 1])[-1])
        assert lines[2 * rank + 1].startswith(f"ssh {host} ")
        assert words[words.index("--node-rank") + 1] == str(rank)
        assert words[words.index("--max-restarts") + 1] == "2"
        assert f"--machine_rank {rank} --main_process_ip a " in lines[2 * rank + 5]
    assert not (tmp_path / "runs").exists()
