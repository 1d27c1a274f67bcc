"""How soon lost nodes and links are noticed, between two network namespaces that train a tiny model under ZeRO-2."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.namespaces import HOSTS, Hosts, TwoNodes, missing
from engine.errors import NODE_FAILED, UserError

LIMIT = 60.0
"""Heartbeat limit in seconds while nodes are killed: the verdict must not need it."""
STEP = 300
"""Optimizer step that both ranks have come to when something happens to them; the launchers know of their training by then."""


def killed_node_seconds(count: int) -> list[float]:
    """Returns the seconds from the end of all processes on node b to the end of `bothways launch` on node a, of `count` runs."""
    return [_seconds("b", LIMIT) for _ in range(count)]


def cut_link_seconds_over_limit(count: int, limit: float) -> list[float]:
    """Returns the seconds, beyond the heartbeat limit, from a cut link to the end of `bothways launch` on both nodes."""
    return [_seconds(None, limit) - limit for _ in range(count)]


def _seconds(killed: str | None, limit: float) -> float:
    """Returns the seconds until every surviving node has ended with the right verdict.

    Args:
        killed: host that is killed; None: the link is cut.

    Raises:
        UserError: namespaces cannot be made here.
        RuntimeError: a verdict is wrong.
    """
    reason = missing()
    if reason:
        raise UserError(reason)
    with tempfile.TemporaryDirectory() as scratch, Hosts() as hosts:
        run = TwoNodes(hosts, _recipe(Path(scratch)), Path(scratch) / "runs", "--heartbeat-limit", str(limit))
        try:
            run.when_training(STEP)
            began = time.monotonic()
            if killed:
                hosts.kill(killed)
            else:
                hosts.link(up=False)
            for host in HOSTS:
                if host != killed:
                    _check(run, host)
            return time.monotonic() - began
        finally:
            run.end()


def _check(run: TwoNodes, host: str) -> None:
    status, (other,) = run.wait(host), [name for name in HOSTS if name != host]
    said = run.output(host, "err")
    if status != NODE_FAILED or f"node {other} (rank {HOSTS.index(other)}): no heartbeat for " not in said:
        raise RuntimeError(f"node {host} ended with {status} and said: {said}")


def _recipe(directory: Path) -> Path:
    from tests.recipes import pretrain_section, ragged_rows, train_section, write_recipe, write_rows

    write_rows(directory / "rows.jsonl", ragged_rows(200))
    train = train_section(steps=1_000_000, evaluate_every=100_000)
    return write_recipe(directory, {"base": {"pretrain": pretrain_section(train=train, parallel="zero2")}})
