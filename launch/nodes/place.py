"""The hosts that run a training stage together: where this one stands among them, and the command line of each.

The recipe, the data and the directory of runs lie on a file system that all of them see. The ranks of attempt k meet at TCP port
P + k of node 0; the launchers of the nodes talk to each other over UDP port P.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shlex
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.gpu import gpus

PORT = 29500
"""torch's own default for the rendezvous."""
HEARTBEAT_LIMIT = 300.0
"""Seconds without a sign of life after which a rank counts as stuck; a step of a large model on a slow link may take minutes."""


@dataclass(frozen=True)
class Supervision:
    """How a running stage is looked after."""

    max_restarts: int = 0
    """How often the ranks of one stage are started again in place."""
    heartbeat_limit: float = HEARTBEAT_LIMIT
    """Seconds; engine.stages.heartbeat.PHASES says which multiple of it a phase may last."""
    records: Path | None = None
    """Where the ranks' records, heartbeats and logs stay; None: in a temporary directory, without logs."""


@dataclass(frozen=True)
class Place:
    """The place of this host among the nodes.

    Raises:
        UserError: the numbers contradict each other.
    """

    nodes: int = 1
    rank: int = 0
    """Number of this node, from 0."""
    address: str = "127.0.0.1"
    """Name or address of node 0 as the others reach it."""
    port: int = PORT
    per_node: int | None = None
    """Ranks on every node; None: one per GPU, or one."""
    on_gpus: bool = False
    """`per_node` was given as a number of GPUs."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.nodes:
            raise UserError(f"--node-rank {self.rank}: with --nodes {self.nodes} it is a number from 0 to {self.nodes - 1}")

    @property
    def several(self) -> bool:
        """True when there is another node."""
        return self.nodes > 1

    @property
    def processes(self) -> int:
        """Ranks on this node."""
        return self.per_node or max(1, gpus())

    @property
    def total(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes

    def port_of(self, attempt: int) -> int:
        """TCP port of an attempt: late ranks of the one before cannot meet those of the next."""
        return self.port + attempt

    def check(self, supervision: Supervision) -> None:
        """Looks at what can be known before anything starts.

        Raises:
            UserError: ports out of range or in use, an address without a meaning, more GPUs than this node has.
        """
        check_ports(self.port, supervision.max_restarts)
        here = gpus()
        if self.on_gpus and self.processes > here:
            raise UserError(f"--gpus-per-node {self.processes}: this node has {here} GPUs: lower it, or use --processes-per-node")
        if here and self.processes > here:
            raise UserError(f"--processes-per-node {self.processes}: this node has {here} GPUs: lower it")
        if not self.several:
            return
        resolve(self.address)
        if self.rank == 0:
            require_free(self.port)


def place_of(
    nodes: int,
    node_rank: int | None,
    main_address: str | None,
    main_port: int,
    gpus_per_node: int | None,
    processes_per_node: int | None,
) -> Place:
    """Returns the place that the options of `bothways launch` name.

    Raises:
        UserError: one is missing, or two contradict each other.
    """
    if gpus_per_node and processes_per_node:
        raise UserError("--gpus-per-node and --processes-per-node are the same number: give one of them")
    if nodes > 1 and node_rank is None:
        raise UserError(
            f"--node-rank is missing: run this on each of the {nodes} hosts with its own number (0 to {nodes - 1}), "
            "or name the hosts with --hosts; --dry-run shows the commands"
        )
    if nodes > 1 and main_address is None:
        raise UserError("--main-address is missing: the name or address of node 0, as the other nodes reach it")
    address = main_address or "127.0.0.1"
    return Place(nodes, node_rank or 0, address, main_port, gpus_per_node or processes_per_node, gpus_per_node is not None)


def check_ports(port: int, max_restarts: int) -> None:
    """Raises UserError unless `port` and those of all restarts are ports that a user may open."""
    if not 1024 <= port <= 65535 - max_restarts:
        highest = f"{65535 - max_restarts}" + (f" (each of {max_restarts} restarts takes the next port)" if max_restarts else "")
        raise UserError(f"--main-port {port}: it has to lie between 1024 and {highest}")


def resolve(address: str) -> str:
    """Returns the IP address of a host name.

    Raises:
        UserError: it has none.
    """
    try:
        return str(socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)[0][4][0])
    except (OSError, UnicodeError) as error:  # a name that cannot be one
        raise UserError(f"--main-address {address}: no host of this name is known here ({error})") from None


def require_free(port: int) -> None:
    """Raises UserError when something listens on this host's TCP port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UserError(f"--main-port {port}: in use on this host: choose another one, the same on every node") from None


def interface_to(address: str) -> str | None:
    """Returns the network interface that leads to an IPv4 host, or None; connecting a UDP socket sends nothing."""
    target = resolve(address)
    if ipaddress.ip_address(target).version != 4:
        return None
    if target == "127.0.1.1":  # Debian's name for this host itself, by which no other host can reach it
        target = "192.0.2.1"  # an address that only the default route leads to (RFC 5737)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, PORT))
        except OSError:
            return None
        mine = socket.inet_aton(probe.getsockname()[0])
        siocgifaddr = 0x8915
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", name[:15].encode()))
                if found[20:24] == mine:
                    return name
    return None


def network(place: Place) -> dict[str, str]:
    """Environment that makes gloo and NCCL meet over the interface to the main node, where it says nothing itself.

    NCCL still moves data over InfiniBand where there is some. Its `=` asks for exactly this name: `eth1` would be `eth10`, too.
    """
    name = interface_to(place.address) if place.several else None
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}
    return {key: value for key, value in wanted.items() if key not in os.environ}


def node_command(arguments: list[str], place: Place) -> list[str]:
    """Returns the command line that one node runs.

    Args:
        arguments: of `bothways launch`, without those of the place.
        place: of that node.
    """
    numbers = ["--nodes", str(place.nodes), "--node-rank", str(place.rank)]
    numbers += ["--main-address", place.address, "--main-port", str(place.port)]
    if place.per_node is not None:
        numbers += ["--gpus-per-node" if place.on_gpus else "--processes-per-node", str(place.per_node)]
    return [sys.executable, "-m", "launch.cli", "launch", *arguments, *numbers]


def shown(command: list[str]) -> str:
    """Returns a command line as a shell takes it, starting in this working directory."""
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
