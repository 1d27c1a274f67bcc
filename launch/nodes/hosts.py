"""`bothways launch --hosts a,b`: one host starts the command of every node, shows what they print, and stops them together.

Every node's command listens to its standard input: a line asks it to stop, the end of the input too. So a request to stop reaches
nodes behind any remote shell, and no node goes on when the host that controls them is gone.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from engine.errors import PREEMPTED, UserError
from engine.stages.stage import Stage
from engine.terminal import ReaderGone
from launch import local
from launch.nodes.place import Place, node_command, shown
from launch.ranks import POLL, Requests
from launch.recipe import KINDS
from launch.watchdog import StageError

ATTENDED = "BOTHWAYS_ATTENDED"
"""Environment variable: set for a command whose standard input says when to stop."""
CARRIED = ("NCCL_", "TORCH_NCCL_", "GLOO_", "BOTHWAYS_")
"""Variables whose names begin so travel to every node: what they say about the network holds for all, or for none."""
ALONE_SECONDS = 30.0
"""How long the other nodes may go on when one has failed: they find out why by themselves."""
STOP = "stop\n"


def read_hosts(hosts: str, nodes: int, node_rank: int | None) -> list[str]:
    """Returns the hosts of `--hosts a,b`.

    Raises:
        UserError: an empty name, or options that say something else.
    """
    names = [name.strip() for name in hosts.split(",")]
    if not all(names):
        raise UserError(f"--hosts {hosts}: a name is empty: write them as a,b,c")
    if node_rank is not None:
        raise UserError("--hosts starts all nodes from here, --node-rank is for one of them: give one of the two")
    if nodes not in (1, len(names)):
        raise UserError(f"--nodes {nodes}, but --hosts names {len(names)}: leave --nodes out")
    return names


def remote_command(shell: str, host: str, command: list[str]) -> list[str]:
    """Returns the command line that runs `command` on a host in this working directory.

    Args:
        shell: how to get there, `{host}` stands for the host: `ssh {host}` or `ip netns exec {host}`.

    Raises:
        UserError: the shell does not name the host.
    """
    if "{host}" not in shell:
        raise UserError(f"--shell '{shell}': write {{host}} where the host's name belongs, as in 'ssh {{host}}'")
    try:
        words = [word.replace("{host}", host) for word in shlex.split(shell)]
    except ValueError as error:
        raise UserError(f"--shell '{shell}': {str(error).lower()}") from None
    if not shutil.which(words[0]):
        raise UserError(f"--shell '{shell}': there is no program '{words[0]}' here")
    text = shown(command)
    # ssh hands one text to the shell over there; other programs start a command.
    return [*words, text] if Path(words[0]).name == "ssh" else [*words, "sh", "-c", text]


def carried(names: Sequence[str]) -> dict[str, str]:
    """Returns the variables of this environment that travel to every node: those of CARRIED, and those that are named.

    Raises:
        UserError: a named one is not set here.
    """
    for name in names:
        if name not in os.environ:
            raise UserError(f"--env {name}: it is not set here: write --env NAME after `export NAME=…`")
    found = {name for name in os.environ if name.startswith(CARRIED)} | set(names)
    return {name: os.environ[name] for name in sorted(found - {ATTENDED})}


def with_variables(variables: dict[str, str], command: list[str]) -> list[str]:
    """Returns a command line that runs a command with further environment variables."""
    return ["env", *(f"{name}={value}" for name, value in variables.items()), *command] if variables else command


def show_commands(
    arguments: list[str], places: list[Place], hosts: list[str] | None, shell: str, names: Sequence[str] = ()
) -> None:
    """Prints the command of every node; the values of named variables, which may be secret, are not shown."""
    variables = {name: "…" if name in names else value for name, value in carried(names).items()} if hosts else {}
    for place in places:
        command = with_variables(variables, node_command(arguments, place))
        line = shlex.join(remote_command(shell, hosts[place.rank], command)) if hosts else shown(command)
        print(f"# node {place.rank}" + (f" ({hosts[place.rank]})" if hosts else "") + f"\n{line}", flush=True)


def show_stages(stages: list[Stage[Any]], overrides: list[str], places: list[Place]) -> None:
    """Prints the `accelerate launch` by which each node will take part in each training stage."""
    for stage in stages:
        for place in places if KINDS[stage.kind].spread else []:
            print(f"# stage {stage.name} on node {place.rank}\n#   {shlex.join(local.command(stage, overrides, place))}")


def run_hosts(arguments: list[str], places: list[Place], hosts: list[str], shell: str, names: Sequence[str] = ()) -> None:
    """Runs all nodes to their end, with the variables that travel (see `carried`).

    SIGINT, SIGTERM and SIGUSR1 ask all nodes to save a checkpoint and stop, the second one ends them.

    Raises:
        StageError: a node has failed, or the command was asked to stop.
    """
    show_commands(arguments, places, hosts, shell, names)
    with Requests() as requests:
        variables = {ATTENDED: "1", **carried(names)}
        full = [with_variables(variables, node_command(arguments, place)) for place in places]
        commands = [remote_command(shell, hosts[place.rank], command) for place, command in zip(places, full, strict=True)]
        nodes = [_Node(host, command) for host, command in zip(hosts, commands, strict=True)]
        told, failed_at = 0, 0.0
        while any(node.process.poll() is None for node in nodes):
            time.sleep(POLL)
            for _ in requests.signals[told:]:
                told += 1
                for node in nodes:
                    node.stop()
            if told < 2 and any(node.process.poll() for node in nodes):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > ALONE_SECONDS * (told + 1):
                    requests.signals.append(signal.SIGTERM)
        for node in nodes:
            node.finish()
    failed = [node for node in nodes if node.process.returncode]
    if failed and requests.first == signal.SIGINT:
        raise StageError(130, "asked to stop: run again to go on")
    if failed:
        # Node 0 tells how all ended, unless it was not even reached; a request to stop is nobody's failure.
        first = min(failed, key=lambda node: (node.process.returncode == PREEMPTED, hosts.index(node.host)))
        status = first.process.returncode
        raise StageError(status if status > 0 else 1, f"node {first.host} ended with status {status}")


class _Node:
    """The command of one node as it runs behind its shell."""

    def __init__(self, host: str, command: list[str]) -> None:
        self.host = host
        # A session of its own: a terminal's Ctrl-C reaches only this process, which tells all nodes.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self._threads = [threading.Thread(target=self._show, args=pair, daemon=True) for pair in streams]
        for thread in self._threads:
            thread.start()

    def _show(self, source: IO[str], target: IO[str]) -> None:
        with contextlib.suppress(ReaderGone):
            for line in source:
                print(f"{self.host}: {line}", end="", file=target, flush=True)

    def stop(self) -> None:
        """Asks it to stop."""
        assert self.process.stdin
        try:
            self.process.stdin.write(STOP)
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended

    def finish(self) -> None:
        """Waits until all that it has printed is shown."""
        for thread in self._threads:
            thread.join()


def attend() -> None:
    """Makes this process stop when its standard input says so or ends, where whoever started it has promised to speak there."""
    if os.environ.pop(ATTENDED, None):
        threading.Thread(target=_listen, name="stdin", daemon=True).start()


def _listen() -> None:
    told = False
    # Not through sys.stdin: a thread that waits in it would break the end of the interpreter.
    while data := os.read(0, 64):
        for _ in range(data.count(b"\n")):
            told = True
            os.kill(os.getpid(), signal.SIGTERM)
    if not told:
        os.kill(os.getpid(), signal.SIGTERM)
