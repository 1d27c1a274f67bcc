"""Nodes beside node 0: they take part in the training stages as node 0 orders, and end as it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import Recipe
from engine.errors import NODE_FAILED, PREEMPTED, UserError
from engine.stages.stage import Stage
from launch.local import failure, prepare_operators, records_of, start
from launch.nodes.link import JOIN_SECONDS, Link, Order, host_name
from launch.nodes.place import Place, Supervision
from launch.ranks import POLL, Ranks, Requests, ending
from launch.recipe import load_stages
from launch.watchdog import GRACE, LOST, NodeLife, StageError, Verdict, judge, may_restart

SEEN_SECONDS = 60.0
"""How long a shared file system may take to show here what node 0 has published."""


class Follower:
    """This node under the orders of node 0."""

    def __init__(
        self, recipe: Recipe, overrides: list[str], restart: bool, place: Place, supervision: Supervision, link: Link
    ) -> None:
        self.recipe, self.overrides, self.restart = recipe, overrides, restart
        self.place, self.supervision, self.link = place, supervision, link
        self._restarts = 0
        self._heard = time.monotonic()
        self._patience = JOIN_SECONDS

    def run(self, say: Callable[[str], None]) -> None:
        """Follows to the end.

        Raises:
            UserError, StageError: what ended node 0, or that it is gone.
        """
        taken: tuple[str, str | None, int] | None = None
        with Requests() as requests, records_of(self.supervision) as records:
            while True:
                order = self.link.order
                self._check_line()
                self._check_requests(requests)
                if order.over:
                    if order.verdict:
                        raise failure(replace(order.verdict, details=""))
                    return
                # An attempt that began without this launcher goes on without it.
                begins = order.stage and not order.verdict and not order.go
                if begins and (self.link.token, order.stage, order.attempt) != taken:
                    taken = (self.link.token, order.stage, order.attempt)
                    self._take_part(order, requests, records, say)
                time.sleep(POLL / 3)

    def _check_requests(self, requests: Requests) -> None:
        if requests.signals:
            self._idle(requests.first)
            time.sleep(1)  # node 0 has heard it twice by then
            raise StageError(130 if requests.first == signal.SIGINT else PREEMPTED, "asked to stop: run again to go on")

    def _check_line(self) -> None:
        node0 = self.link.node0()
        if node0 and node0.silent < LOST:
            self._patience, self._heard = self.supervision.heartbeat_limit, time.monotonic()
        silent = time.monotonic() - self._heard
        if silent <= self._patience:
            return
        if node0:
            raise failure(self._judge("", NodeLife(self.place.rank, host_name()), 0.0, node0) or _unreachable(self.place, silent))
        if not self.link.token:
            directory = self.recipe.runs / self.recipe.name
            raise UserError(
                f"node 0 has left nothing in {directory} for {silent:.0f} s: start it, and give all nodes the same --runs "
                "on a file system that all of them see"
            )
        raise failure(_unreachable(self.place, silent))

    def _idle(self, asked: int | None = None) -> None:
        self.link.say(ready=False, life=NodeLife(self.place.rank, host_name(), asked=asked))

    def _take_part(self, order: Order, requests: Requests, records: Path, say: Callable[[str], None]) -> None:
        """Runs this node's ranks of one attempt."""
        assert order.stage
        token = self.link.token
        try:
            stage = self._ready_stage(order.stage)
            prepare_operators(stage, self.place, say)
        except UserError as error:
            self.link.say(error=str(error))
            raise
        stage.restart = self.restart
        self.link.say(stage=order.stage, attempt=order.attempt, ready=True, life=NodeLife(self.place.rank, host_name()))
        while not self.link.order.go:
            self._check_line()
            self._check_requests(requests)
            if not _same(self.link.order, order) or self.link.token != token:
                return
            time.sleep(POLL / 3)
        self.link.say(ready=False)
        say(f"{order.stage} ({stage.kind})" + (f", restart {order.attempt}" if order.attempt else ""))
        with ending(start(stage, self.overrides, self.place, self.supervision, records, order.attempt)) as ranks:
            verdict = self._watch(stage, order, token, ranks, requests)
            stacks = ranks.stacks(verdict.stuck) if verdict else ""
        if verdict is None:
            return
        # Node 0 has told its own output where the ranks failed; where one hangs only this node can tell.
        verdict = replace(verdict, details=stacks)
        if self.link.order.verdict is None:
            # Node 0 is gone: it may come back, as often as restarts are allowed.
            if not may_restart(verdict, self._restarts, self.supervision.max_restarts):
                raise failure(verdict)
            self._restarts += 1
            self._patience, self._heard = JOIN_SECONDS, time.monotonic()
            say(f"{verdict.message}; waiting for it (at most {JOIN_SECONDS:.0f} s)")
        elif stacks:
            say(stacks)
        self._idle()

    def _watch(self, stage: Stage[Any], order: Order, token: str, ranks: Ranks, requests: Requests) -> Verdict | None:
        """Watches this node's ranks until node 0 says how the attempt ended; returns its verdict, None for success."""
        failing: float | None = None
        moved_on: float | None = None
        while True:
            life = ranks.attend(self.place.rank, host_name(), requests)
            if life.exited and stage.finished():
                life = replace(life, exited=0)
            self.link.say(life=life)
            now = self.link.order
            if self.link.token != token:
                return Verdict(NODE_FAILED, f"stage '{stage.name}': node 0 was launched again", restart=True)
            if now.verdict and (now.over or _same(now, order)):
                return now.verdict
            if not _same(now, order):
                # A later attempt has begun; or it is published, and our ranks are on their way out.
                moved_on = moved_on or time.monotonic()
                if now.stage == order.stage or life.exited is not None or time.monotonic() - moved_on > GRACE:
                    return None
            if any(rank.failed for rank in life.ranks) or life.exited:
                failing = failing or time.monotonic()
            node0 = self.link.node0()
            if node0 is not None and node0.silent >= LOST and life.exited != 0:
                verdict = self._judge(stage.name, life, time.monotonic() - failing if failing else 0.0, node0)
                if verdict:
                    return verdict
            elif life.exited == 0:
                self._check_line()

    def _judge(self, stage: str, life: NodeLife, failing: float, node0: NodeLife) -> Verdict | None:
        return judge(stage, [node0, life], self.supervision.heartbeat_limit, failing)

    def _ready_stage(self, name: str) -> Stage[Any]:
        """Returns a stage as soon as this host sees what it reads.

        Raises:
            UserError: it does not within a minute.
        """
        give_up = time.monotonic() + SEEN_SECONDS
        while True:
            # Read anew: a stage remembers the hashes of its inputs.
            stage = next(stage for stage in load_stages(self.recipe) if stage.name == name)
            try:
                stage.inputs  # noqa: B018
                return stage
            except UserError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(1)


def _same(order: Order, other: Order) -> bool:
    return (order.stage, order.attempt, order.over) == (other.stage, other.attempt, other.over)


def _unreachable(place: Place, silent: float) -> Verdict:
    reach = f"UDP port {place.port} of {place.address}"
    return Verdict(NODE_FAILED, f"node 0 does not answer at {reach} for {silent:.0f} s: is it running, and is the port open?")
