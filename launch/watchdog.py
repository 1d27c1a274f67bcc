"""What the launchers see of a running stage, and what they conclude from it. Nothing here starts, reads or sends anything."""

from __future__ import annotations

import signal
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.errors import NODE_FAILED, PREEMPTED, USER_ERROR
from engine.stages.heartbeat import PHASES, Beat
from engine.stages.rank import memory_message

LOST = 5.0
"""Seconds of silence of a node that explain broken connections; its launcher speaks twice a second."""
SETTLE = 1.5
"""Seconds between the first failure and a verdict on several nodes: the cause may be on its way from another node."""
GRACE = 10.0
"""Seconds that the ranks beside a failed one may take; one that waits for it in a collective operation may never notice."""
AGAIN = "; run again to go on"
"""End of the messages that leave it to the user to start again."""
MESSAGE_BYTES = 8192
"""Longest traceback that travels between nodes."""


@dataclass(frozen=True)
class RankLife:
    """One rank as the launcher of its node sees it."""

    rank: int
    beat: Beat | None = None
    status: int | None = None
    """Exit status; None while it runs, and for ever when it was killed."""
    killed: bool = False
    """Its process is gone and did not say why."""
    stopped: bool = False
    """Its process exists and does not run (SIGSTOP)."""
    collective: bool = False
    """It failed because a collective operation lost its peer."""
    message: str = ""
    ended: int = 0
    """When, in nanoseconds."""

    @property
    def failed(self) -> bool:
        """True when it has ended without success."""
        return self.killed or bool(self.status)


@dataclass(frozen=True)
class NodeLife:
    """One node as a launcher sees it."""

    node: int
    host: str
    ranks: tuple[RankLife, ...] = ()
    silent: float = 0.0
    """Seconds since its launcher has been heard."""
    asked: int | None = None
    """Signal by which its launcher was asked to stop."""
    exited: int | None = None
    """Exit status of its `accelerate launch`."""
    anew: bool = False
    """Its launcher has been started again during the attempt: the ranks that took part are gone."""
    short_of_memory: bool = False
    """The kernel has ended processes on it for want of memory since the stage began."""

    def to_json(self) -> dict[str, Any]:
        """Returns what travels to the other nodes; of all messages only the tail of the one that matters in full."""
        failed = sorted((rank for rank in self.ranks if rank.message), key=lambda rank: (rank.collective, rank.ended))
        ranks = [
            replace(rank, message=rank.message[-(MESSAGE_BYTES if rank in failed[:1] else MESSAGE_BYTES // 64) :])
            for rank in self.ranks
        ]
        return asdict(replace(self, ranks=tuple(ranks), silent=0.0))

    @classmethod
    def of_json(cls, value: dict[str, Any], silent: float) -> NodeLife:
        """Reads what `to_json` wrote; raises TypeError or KeyError on anything else."""
        ranks = tuple(RankLife(**{**rank, "beat": Beat(**rank["beat"]) if rank["beat"] else None}) for rank in value["ranks"])
        return cls(**{**value, "ranks": ranks, "silent": silent})


@dataclass(frozen=True)
class Verdict:
    """How a stage ends."""

    status: int
    """Exit status of the whole command."""
    message: str
    """One line."""
    details: str = ""
    """A traceback, or nothing."""
    restart: bool = False
    """Starting the ranks again may help."""
    stuck: tuple[int, ...] = ()
    """Ranks whose stacks show where they hang."""


class StageError(Exception):
    """A stage that ended without a result.

    Args:
        status: exit status for the whole command.
        message: one line.
        details: a traceback, or nothing.
    """

    def __init__(self, status: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.details = details


def may_restart(verdict: Verdict, restarts: int, max_restarts: int) -> bool:
    """True when the ranks are to be started again: never after a user's mistake or a request to stop."""
    return verdict.restart and verdict.status not in (USER_ERROR, PREEMPTED, 130) and restarts < max_restarts


def judge(stage: str, nodes: list[NodeLife], limit: float, failing: float) -> Verdict | None:
    """Decides whether and how a running stage has ended.

    Args:
        stage: its name.
        nodes: all nodes, or on the others than node 0: this one and node 0.
        limit: heartbeat limit in seconds.
        failing: seconds since the first failure was seen; 0 without one.

    Returns:
        the verdict, or None while the stage goes on or while the cause of a failure may still come in.
    """
    names = _Names(stage, nodes)
    working = [node for node in nodes if node.exited != 0]
    gone = [node for node in working if node.silent >= limit or node.anew]
    quiet = [node for node in working if node.silent >= LOST]
    if gone:
        return _gone(names, gone)
    ranks = [rank for node in nodes for rank in node.ranks]
    if any(rank.failed for rank in ranks) or any(node.exited for node in nodes):
        return _failure(names, nodes, quiet, limit, failing)
    stuck = [rank for rank in ranks if _overdue(rank, limit)]
    if stuck and quiet:
        return _gone(names, quiet)
    return _stall(names, ranks, stuck) if stuck else None


def _overdue(rank: RankLife, limit: float) -> bool:
    return rank.status is None and not rank.killed and rank.beat is not None and rank.beat.age_seconds > limit * rank.beat.allowed


def _failure(names: _Names, nodes: list[NodeLife], quiet: list[NodeLife], limit: float, failing: float) -> Verdict | None:
    """Some rank has failed: finds the first that failed by itself, not those that it took along."""
    ranks = [rank for node in nodes for rank in node.ranks]
    ended = sorted((rank for rank in ranks if rank.status), key=lambda rank: rank.ended)
    causes = [rank for rank in ended if rank.status != PREEMPTED and not rank.collective]
    killed = [rank for rank in ranks if rank.killed]
    asked = next((node.asked for node in nodes if node.asked), None)
    all_over = all(node.exited is not None for node in nodes)
    # A checkpoint that is being written may take its time; nothing else may.
    stopping = bool(asked or (ended and ended[0].status == PREEMPTED)) and not causes and not killed
    patience = limit if stopping else GRACE
    settled = all_over or failing >= (SETTLE if len(nodes) > 1 else 0)
    if len(nodes) == 1 and not all_over and failing < patience:
        return None
    if causes and settled:
        return _crash(names, causes[0])
    if asked and (all_over or killed or failing >= patience):
        return Verdict(
            130 if asked == signal.SIGINT else PREEMPTED, f"stage '{names.stage}' was asked to stop: run again to go on"
        )
    if quiet and not stopping:
        return _gone(names, quiet)
    if killed and settled:
        return _killed(names, killed[0])
    if not all_over and failing < patience:
        return None
    if ended and ended[0].status == PREEMPTED:
        return Verdict(PREEMPTED, f"stage '{names.stage}' was asked to stop: run again to go on")
    if ended:
        lost = _crash(names, ended[0])
        return replace(lost, status=NODE_FAILED) if len(nodes) > 1 else lost
    return _not_started(names, nodes)


def _crash(names: _Names, rank: RankLife) -> Verdict:
    if rank.status == USER_ERROR:
        return Verdict(USER_ERROR, rank.message)
    last = rank.message.strip().splitlines()[-1] if rank.message.strip() else f"exit status {rank.status}"
    return Verdict(1, f"stage '{names.stage}' crashed in process {names.of(rank)}: {last}", rank.message, restart=True)


def _killed(names: _Names, rank: RankLife) -> Verdict:
    who = f"process {names.of(rank)} of stage '{names.stage}' was killed"
    if names.node_of(rank).short_of_memory:
        return Verdict(1, f"{who} by the kernel: {memory_message(rank.beat)}", restart=True)
    return Verdict(1, f"{who}: out of memory, or killed by hand{AGAIN}", restart=True)


def _not_started(names: _Names, nodes: list[NodeLife]) -> Verdict:
    node = next(node for node in nodes if node.exited)
    where = f" on {names.node(node)}" if len(nodes) > 1 else ""
    return Verdict(1, f"stage '{names.stage}' could not be started{where} (exit status {node.exited})", restart=True)


def _gone(names: _Names, gone: list[NodeLife]) -> Verdict:
    node = gone[0]
    last = min((rank for rank in node.ranks if rank.beat), key=_progress, default=None)
    where = f", last in {last.beat.where}" if last and last.beat else ""
    numbers = ", ".join(str(rank.rank) for rank in node.ranks)
    ranks = f" (rank{'s' if len(node.ranks) > 1 else ''} {numbers})" if numbers else ""
    said = f"{names.node(node)}{ranks}: no heartbeat for {node.silent:.0f} s{where}"
    said += "".join(f"; likewise {names.node(other)}" for other in gone[1:])
    during = f"stage '{names.stage}': " if names.stage else ""
    message = f"{during}{said}: the node or its link is gone"
    if node.anew:
        message = f"{during}{names.node(node)} was launched again"
    return Verdict(NODE_FAILED, message, restart=True)


def _stall(names: _Names, ranks: list[RankLife], stuck: list[RankLife]) -> Verdict:
    # Ranks that wait for another one in a collective operation have come further than the one that hangs, or hang for longer.
    running = [rank for rank in ranks if rank.status is None and rank.beat]
    furthest_back = min(map(_progress, running))
    last = [rank for rank in running if _progress(rank) == furthest_back]
    culprits = [rank for rank in running if rank.stopped] or [rank for rank in last if rank in stuck] or last
    beat = max((rank.beat for rank in culprits if rank.beat), key=lambda beat: beat.age_seconds)
    who = ", ".join(f"{names.of(rank)}" for rank in culprits)
    stopped = " (the process is stopped)" if culprits[0].stopped else ""
    message = (
        f"stage '{names.stage}': rank{'s' if len(culprits) > 1 else ''} {who}: no progress for {beat.age_seconds:.0f} s, "
        f"last in {beat.where}{stopped}"
    )
    return Verdict(1, message, restart=True, stuck=tuple(rank.rank for rank in culprits))


def _progress(rank: RankLife) -> tuple[int, int]:
    assert rank.beat is not None
    return -1 if rank.beat.step is None else rank.beat.step, list(PHASES).index(rank.beat.phase)


class _Names:
    """How messages call ranks and nodes: with the host, where there are several."""

    def __init__(self, stage: str, nodes: list[NodeLife]) -> None:
        self.stage = stage
        self._nodes = nodes
        self._unique = len({node.host for node in nodes}) == len(nodes)

    def node(self, node: NodeLife) -> str:
        return f"node {node.host}" if self._unique else f"node {node.node} ({node.host})"

    def node_of(self, rank: RankLife) -> NodeLife:
        return next(node for node in self._nodes if rank in node.ranks)

    def of(self, rank: RankLife) -> str:
        return f"{rank.rank} on {self.node(self.node_of(rank))}" if len(self._nodes) > 1 else f"{rank.rank}"
