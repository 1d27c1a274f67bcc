"""The ranks of one stage on this node during one attempt: started, watched, asked to stop, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.stages import heartbeat
from engine.stages.rank import PARENT, Record, read_records
from launch.watchdog import NodeLife, RankLife

POLL = 0.3
"""Seconds between two looks at the ranks."""
STACK_SECONDS = 2.0
"""How long to wait for the stack of a rank that hangs; one that is stopped never answers."""
GONE, STOPPED = ("X", "Z"), ("T", "t")
"""Linux's letters for processes that have ended, and for those that SIGSTOP or a debugger holds."""


class Requests:
    """SIGINT, SIGTERM and SIGUSR1 while it is entered: the first asks the ranks to save and stop, the second ends them."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    @property
    def first(self) -> int | None:
        """The first signal that came."""
        return self.signals[0] if self.signals else None

    @property
    def urgent(self) -> bool:
        """True after the second one."""
        return len(self.signals) > 1

    def __enter__(self) -> Requests:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, lambda number, frame: self.signals.append(number)) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Ranks:
    """The processes of one attempt on this node.

    Args:
        command: starts them.
        environment: of all of them.
        numbers: of the ranks on this node.
        records: directory of their records, heartbeats and logs.
        show_log: copy what rank 0 writes into its log to our output.
    """

    def __init__(self, command: list[str], environment: dict[str, str], numbers: range, records: Path, show_log: bool) -> None:
        self._numbers, self._records = numbers, records
        for number in numbers:
            for name in (f"rank{number}.json", f"rank{number}.stack", f"beat{number}"):
                (records / name).unlink(missing_ok=True)
        self._told: set[int] = set()
        self._killed_for_memory = _killed_for_memory()
        self._log = records / "rank0.log" if show_log and 0 in numbers else None
        self._shown = self._log.stat().st_size if self._log and self._log.exists() else 0
        # A session of its own: a terminal's Ctrl-C reaches only this process, which passes it on.
        self.process = subprocess.Popen(command, env={**environment, PARENT: str(os.getpid())}, start_new_session=True)

    def wait(self) -> None:
        """Waits for the end of the launcher, but not longer than until the next look is due."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=POLL)
        if self._log and self._log.exists():
            with self._log.open("rb") as file:
                file.seek(self._shown)
                new = file.read()
            self._shown += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    def attend(self, node: int, host: str, requests: Requests) -> NodeLife:
        """Waits until the next look is due, passes on what was requested, and returns this node as it is then."""
        self.wait()
        if requests.urgent:
            self.end()
        elif requests.first:
            self.ask_to_stop()
        return self.life(node, host, requests.first)

    def life(self, node: int, host: str, asked: int | None) -> NodeLife:
        """Returns this node as it is now."""
        exited = self.process.poll()  # before the records: what ended before it has left its record by then
        beats = {beat.rank: beat for beat in heartbeat.read(self._records)}
        ranks = tuple(self._rank_life(record, beats.get(record.rank)) for record in self._own_records())
        short = _killed_for_memory() > self._killed_for_memory
        return NodeLife(node, host, ranks, asked=asked, exited=exited, short_of_memory=short)

    def ask_to_stop(self) -> None:
        """Asks every rank once to save a checkpoint and stop; one that comes up later is asked the next time."""
        for record in self._own_records():
            if record.status is None and record.pid not in self._told:
                self._told.add(record.pid)
                _signal(record.pid, signal.SIGUSR1)

    def stacks(self, ranks: tuple[int, ...]) -> str:
        """Returns where the given ranks hang, as far as they are on this node and answer."""
        records = [record for record in self._own_records() if record.rank in ranks and record.status is None]
        for record in records:
            _signal(record.pid, signal.SIGUSR2)
        paths = [self._records / f"rank{record.rank}.stack" for record in records]
        give_up = time.monotonic() + STACK_SECONDS
        while time.monotonic() < give_up and not all(path.exists() and path.stat().st_size for path in paths):
            time.sleep(0.05)
        found = [f"rank {record.rank}:\n{path.read_text()}" for record, path in zip(records, paths, strict=True) if path.exists()]
        return "\n".join(found)

    def end(self) -> None:
        """Ends what still runs; the ranks die with their launcher (PR_SET_PDEATHSIG), so that nothing is left behind."""
        self.process.kill()
        self.process.wait()

    def _rank_life(self, record: Record, beat: heartbeat.Beat | None) -> RankLife:
        state = _process_state(record.pid) if record.status is None else ""
        if state in GONE:
            # It may have left its record after that was read and before its process was looked for.
            record = next((again for again in self._own_records() if again.rank == record.rank), record)
        return RankLife(
            record.rank,
            beat if beat and beat.pid == record.pid else None,
            record.status,
            killed=record.status is None and state in GONE,
            stopped=state in STOPPED,
            collective=record.collective,
            message=record.message,
            ended=record.ended,
        )

    def _own_records(self) -> list[Record]:
        return [record for record in read_records(self._records) if record.rank in self._numbers]


@contextlib.contextmanager
def ending(ranks: Ranks) -> Iterator[Ranks]:
    """Ends the ranks when the body is left, however that happens."""
    try:
        yield ranks
    finally:
        ranks.end()


def _process_state(pid: int) -> str:
    """Returns Linux's letter for the state of a process; X when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _killed_for_memory() -> int:
    """Returns how many processes the kernel has killed for want of memory since it started."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def _signal(pid: int, number: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
