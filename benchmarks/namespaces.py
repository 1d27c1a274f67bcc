"""Two network namespaces of this machine as two hosts: a line between them that can be cut, processes that can be killed at once.

Needs root and `ip` (iproute2); nothing is sent outside of the two namespaces.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.stages import heartbeat
from engine.stages.rank import read_records

HOSTS = ("a", "b")
PROGRAM = ("-m", "launch.cli")
ROOT = Path(__file__).parents[1]


def missing() -> str | None:
    """Returns why namespaces cannot be made here, or None."""
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces need `ip` (iproute2) and `unshare`"
    name = f"bw{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """Hosts `a` (10.77.0.1) and `b` (10.77.0.2) with a link between them; a context manager that always removes them."""

    address = "10.77.0.1"
    """Of host a."""

    def __init__(self) -> None:
        self.prefix = f"bw{os.getpid()}"
        """Of the namespaces' names, before that of the host."""

    def __enter__(self) -> Hosts:
        _remove_left_over()
        self.names = {host: self.prefix + host for host in HOSTS}
        try:
            for name in self.names.values():
                _ip("netns", "add", name)
            a, b = self.names.values()
            _ip("link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
            for number, name in enumerate(self.names.values(), 1):
                _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", name, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host, name in self.names.items():
            self.kill(host)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def command(self, host: str, command: list[str]) -> list[str]:
        """Returns the command that runs `command` on a host, which has the name that it is called here."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
        return ["ip", "netns", "exec", self.names[host], *named, *command]

    def start(self, host: str, command: list[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a process on a host."""
        return subprocess.Popen(self.command(host, command), text=True, **options)

    def kill(self, host: str) -> None:
        """SIGKILL to every process on a host, as when its power is cut (but for the kernel, which closes the connections)."""
        found = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def link(self, up: bool) -> None:
        """Cuts the link between the hosts, or mends it."""
        name = self.names["b"]
        _ip("-n", name, "link", "set", name, "up" if up else "down")


def _remove_left_over() -> None:
    """Removes the namespaces of processes that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines()):
        found = re.fullmatch(r"bw(\d+)(a|b|probe)", name)
        if found and not Path("/proc", found[1]).exists():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class TwoNodes:
    """`bothways launch` on both hosts, one rank each; what they print goes to files in `scratch`.

    Args:
        arguments: further ones of `bothways launch`.
        program: what to run in place of `bothways`.
    """

    def __init__(self, hosts: Hosts, recipe: Path, runs: Path, *arguments: str, program: tuple[str, ...] = PROGRAM) -> None:
        self.hosts, self.recipe, self.runs, self.arguments, self.program = hosts, recipe, runs, arguments, program
        self.scratch = runs.with_name(runs.name + ".nodes")
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.records = self.scratch / "records"
        self.processes: dict[str, subprocess.Popen[str]] = {}
        for host in HOSTS:
            self.start(host)

    def start(self, host: str) -> None:
        """Starts the launcher of a host, for the first time or again."""
        command = [
            *(sys.executable, *self.program, "launch", str(self.recipe), "--runs", str(self.runs)),
            *("--nodes", "2", "--node-rank", str(HOSTS.index(host)), "--main-address", self.hosts.address),
            *("--records", str(self.records), *self.arguments),
        ]
        with (self.scratch / f"{host}.out").open("a") as out, (self.scratch / f"{host}.err").open("a") as err:
            # One thread each: threads that wait for each other make a tiny model slow on a busy machine.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.processes[host] = self.hosts.start(host, command, stdout=out, stderr=err, cwd=ROOT, env=environment)

    def output(self, host: str, kind: str = "out") -> str:
        """Returns what a host has printed, `out` or `err`."""
        return (self.scratch / f"{host}.{kind}").read_text()

    def pid(self, rank: int) -> int:
        """Returns the process of a rank that runs."""
        return next(record.pid for record in read_records(self.records) if record.rank == rank)

    def when_training(self, step: int, patience: float = 240.0) -> None:
        """Waits until both ranks have come to an optimizer step.

        Raises:
            RuntimeError: a host has ended before, or it takes too long.
        """
        give_up = time.monotonic() + patience
        while len([beat for beat in heartbeat.read(self.records) if (beat.step or 0) >= step]) < len(HOSTS):
            if time.monotonic() > give_up or any(process.poll() is not None for process in self.processes.values()):
                raise RuntimeError("\n".join(self.output(host, kind) for host in HOSTS for kind in ("out", "err")))
            time.sleep(0.02)

    def wait(self, host: str, patience: float = 240.0) -> int:
        """Returns the exit status of a host's launcher; raises subprocess.TimeoutExpired."""
        return self.processes[host].wait(timeout=patience)

    def end(self) -> None:
        """Ends whatever still runs on both hosts."""
        for host, process in self.processes.items():
            self.hosts.kill(host)
            process.wait()
