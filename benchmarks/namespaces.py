"""Two network namespaces of this machine as two hosts: a line between them that can be cut, processes that can be killed at once.

Needs root and `ip` (iproute2); nothing is sent outside of the two namespaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from typing import Any

HOSTS = ("a", "b")


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

    def __enter__(self) -> Hosts:
        self.names = {host: f"bw{os.getpid()}{host}" for host in HOSTS}
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


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
