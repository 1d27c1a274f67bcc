"""The line between the launchers of the nodes: small JSON datagrams over UDP, twice a second.

Every node tells node 0 how its ranks are. Node 0 tells the others what to do: which stage and attempt, when to start, how it
ended. A datagram may get lost or come twice: each says everything that holds now. Node 0 leaves a random token in the run
directory, without which nothing is listened to; a node that never finds it does not see the same file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.errors import NODE_FAILED, PREEMPTED, USER_ERROR, UserError
from launch.nodes.place import Place, resolve
from launch.ranks import Requests
from launch.watchdog import NodeLife, StageError, Verdict

BEAT = 0.5
"""Seconds between two datagrams of a node."""
FRESH = 3.0
"""Seconds without a datagram after which a node does not count as there."""
LARGEST = 65_507
"""Bytes of a UDP datagram."""
JOIN_SECONDS = 600.0
"""How long nodes wait for each other before an attempt; operators may have to be compiled on one of them."""
LINGER = 4.0
"""How long node 0 goes on telling the others how it ended."""
LAST_WORDS = 3
"""Datagrams in which a node says the last thing that it has to say: one may get lost."""
PATIENCE = 5.0
"""Seconds of waiting for a node before that is said."""


@dataclass(frozen=True)
class Order:
    """What node 0 says."""

    stage: str | None = None
    """Training stage that is being started or runs; None between two of them."""
    attempt: int = 0
    go: bool = False
    """All nodes have come: start the ranks."""
    verdict: Verdict | None = None
    """How this attempt ended; with `over`, how everything ended."""
    over: bool = False


@dataclass(frozen=True)
class Report:
    """What another node says."""

    life: NodeLife
    setup: str = ""
    """Digest of the options that all nodes have to agree on."""
    stage: str | None = None
    attempt: int = -1
    ready: bool = False
    """It waits for the others to start this attempt."""
    error: str | None = None
    """A mistake that keeps it from taking part."""
    sender: str = field(default_factory=lambda: f"{socket.gethostname()} {os.getpid()}")


class Link:
    """This node's end of the line; a context manager.

    Args:
        place: of this node.
        directory: of the run, on the file system that all nodes see.
        report: what this node says at first.
    """

    def __init__(self, place: Place, directory: Path, report: Report) -> None:
        self.place = place
        self.order, self.report = Order(), report
        self.token = ""
        """Of node 0; empty until it is found."""
        self._file = directory / ".launch-token"
        self._heard: dict[int, tuple[Report, float]] = {}
        self._addresses: dict[int, Any] = {}
        self._node0: tuple[NodeLife, float] | None = None
        self._problem: str | None = None
        self._replaced: set[str] = set()
        self._numbers: dict[str, int] = {}
        self._number, self._next = 0, 0.0
        address = resolve(place.address)
        self._target = (address, place.port)
        self._socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def __enter__(self) -> Link:
        if self.place.rank == 0:
            try:
                self._socket.bind(("", self.place.port))
            except OSError:
                raise UserError(f"--main-port {self.place.port}: in use on this host (UDP): choose another one") from None
            self.token = secrets.token_hex(16)
            self._file.unlink(missing_ok=True)
            with open(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self.token)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for _ in range(LAST_WORDS):
            self._send()
        self._socket.close()
        if self.place.rank == 0:
            self._file.unlink(missing_ok=True)

    def say(self, **changes: Any) -> None:
        """Changes what this node reports."""
        with self._lock:
            self.report = replace(self.report, **changes)

    def command(self, **changes: Any) -> None:
        """Changes what node 0 orders; at once on the line."""
        with self._lock:
            self.order, self._next = replace(self.order, **changes), 0.0

    def others(self) -> dict[int, Report]:
        """Returns, on node 0, the latest report of each other node that has been heard, with its silence filled in."""
        with self._lock:
            heard = dict(self._heard)
        now = time.monotonic()
        return {node: replace(said, life=replace(said.life, silent=now - then)) for node, (said, then) in heard.items()}

    def node0(self) -> NodeLife | None:
        """Returns, on another node, node 0 as it was heard last, with its silence; None when it never was."""
        heard = self._node0
        return heard and replace(heard[0], silent=time.monotonic() - heard[1])

    def check(self) -> None:
        """Raises UserError when nodes contradict each other, or when one cannot take part."""
        errors = [f"node {node} ({said.life.host}): {said.error}" for node, said in self.others().items() if said.error]
        if self._problem or errors:
            raise UserError(self._problem or errors[0])

    def _run(self) -> None:
        while not self._ended.is_set():
            if self.place.rank:
                self._read_token()
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + BEAT
                self._send()
            if select.select([self._socket], [], [], BEAT / 5)[0]:
                with contextlib.suppress(OSError):  # a refused datagram of ours comes back as an error
                    self._receive(*self._socket.recvfrom(LARGEST))

    def _read_token(self) -> None:
        # As long as node 0 does not answer, the token may be that of a launch before.
        heard = self._node0
        if heard is None or time.monotonic() - heard[1] > FRESH:
            with contextlib.suppress(OSError):
                self.token = self._file.read_text()

    def _send(self) -> None:
        if not self.token:
            return
        with self._lock:
            report, order, addresses = self.report, self.order, list(self._addresses.values())
            self._number += 1
        content = {"token": self.token, "number": self._number, "node": self.place.rank, "order": asdict(order)}
        content["report"] = {**vars(report), "life": report.life.to_json()}
        data = json.dumps(content).encode()
        for address in [self._target] if self.place.rank else addresses:
            with contextlib.suppress(OSError):  # a broken link is silence
                self._socket.sendto(data, address)

    def _receive(self, data: bytes, address: Any) -> None:
        try:
            content = json.loads(data)
            if not (self.token and secrets.compare_digest(content["token"], self.token)):
                return
            life = NodeLife.of_json(content["report"].pop("life"), 0.0)
            report, order = Report(life, **content["report"]), content["order"]
            number, node = int(content["number"]), int(content["node"])
            verdict = order.pop("verdict")
            order = Order(**order, verdict=Verdict(**verdict) if verdict else None)
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # not from one of us
        if number <= self._numbers.get(report.sender, 0):
            return  # overtaken by a later one
        self._numbers[report.sender] = number
        with self._lock:
            if self.place.rank:
                self.order, self._node0 = order, (life, time.monotonic())
            else:
                self._take(node, report, address)

    def _take(self, node: int, report: Report, address: Any) -> None:
        before = self._heard.get(node)
        if before and before[0].sender != report.sender:
            self._replaced.add(before[0].sender)
        if report.sender in self._replaced:  # it is still there beside its successor
            hosts = f"{before[0].life.host} and {report.life.host}" if before else report.life.host
            self._problem = f"--node-rank {node} was given to two launchers, on {hosts}: give every host its own number"
        elif report.setup != self.report.setup:
            self._problem = (
                f"node {node} ({report.life.host}) was started with another recipe or other options than node 0: "
                "give all nodes the same recipe, --set, --stage, --nodes and number of ranks"
            )
        self._heard[node] = (report, time.monotonic())
        self._addresses[node] = address


@contextlib.contextmanager
def leading(link: Link) -> Iterator[None]:
    """Tells the other nodes on node 0 how everything ended, when the body is left."""
    verdict: Verdict | None = Verdict(NODE_FAILED, "node 0 has ended")
    try:
        yield
        verdict = None
    except StageError as error:
        verdict = link.order.verdict or Verdict(error.status, str(error))
        raise
    except UserError as error:
        verdict = link.order.verdict or Verdict(USER_ERROR, str(error))
        raise
    except KeyboardInterrupt:
        verdict = Verdict(130, "interrupted")
        raise
    finally:
        link.command(over=True, stage=None, go=False, verdict=verdict)
        give_up = time.monotonic() + LINGER
        time.sleep(BEAT)
        while time.monotonic() < give_up and any(said.life.silent < 3 * BEAT for said in link.others().values()):
            time.sleep(BEAT / 5)


def host_name() -> str:
    """Returns what this host is called in messages; Slurm may run several of its nodes on one host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def lives(link: Link, stage: str, attempt: int) -> list[NodeLife]:
    """Returns the other nodes as node 0 sees them in an attempt that has begun."""
    current = []
    for said in link.others().values():
        took_part = (said.stage, said.attempt) == (stage, attempt)
        # What a node says before it has heard that the attempt began is about the one before.
        running = took_part and not said.ready
        current.append(said.life if running else replace(said.life, ranks=(), exited=None, anew=not took_part))
    return current


def gather(link: Link, stage: str, attempt: int, requests: Requests, say: Callable[[str], None]) -> None:
    """Waits on node 0 until all nodes are ready for an attempt, then starts them.

    Raises:
        UserError: nodes contradict each other, or one cannot take part.
        StageError: a node does not come, or the command was asked to stop.
    """
    link.command(stage=stage, attempt=attempt, go=False, verdict=None)
    link.say(life=NodeLife(0, host_name()))
    told, began = False, time.monotonic()
    while True:
        others = link.others()
        link.check()
        if requests.signals or any(said.life.asked for said in others.values()):
            status = 130 if requests.first == signal.SIGINT else PREEMPTED
            raise StageError(status, f"stage '{stage}' was asked to stop: run again to go on")
        here = {
            node
            for node, said in others.items()
            if said.ready and (said.stage, said.attempt) == (stage, attempt) and said.life.silent < FRESH
        }
        missing = [str(node) for node in range(1, link.place.nodes) if node not in here]
        if not missing:
            link.command(go=True)
            return
        who = f"node{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        waited = time.monotonic() - began
        if waited > JOIN_SECONDS:
            port = f"TCP and UDP port {link.place.port} of {link.place.address}"
            message = f"{who} has not come within {JOIN_SECONDS:.0f} s: start `bothways launch` there, and let it reach {port}"
            raise StageError(NODE_FAILED, message)
        if waited > PATIENCE and not told:
            told = True
            say(f"waiting for {who} (at most {JOIN_SECONDS:.0f} s)")
        time.sleep(BEAT / 5)
