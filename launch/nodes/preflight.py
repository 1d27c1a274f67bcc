"""Are the nodes fit for a training? Every rank joins, GPUs compute, pairs of nodes and all ranks together exchange data.

`bothways launch RECIPE --preflight` runs it on every node; node 0 compares and names nodes that are missing, broken or far slower
than the others. A slow node drags all of them: one ring of all-reduce is as fast as its slowest link.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from engine.errors import NODE_FAILED
from engine.gpu import gpus
from launch.nodes.link import host_name
from launch.nodes.place import Place, network
from launch.nodes.preflight_rank import MEGABYTES
from launch.watchdog import StageError

SLOW = 0.5
"""Share of the median bandwidth of the nodes below which one is bad."""

LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "third_party/gloo", "timed out", "Timeout", "no answer within")
"""Signs of a rank that failed because another one did."""


@dataclass
class NodeReport:
    """What was found on one node."""

    node: int
    host: str | None = None
    """None: it has not come, and its name is not known."""
    gpus: int = 0
    gigabytes_per_second: float | None = None
    """To the better one of its two neighbours, in one direction while the other one is busy, too."""
    problem: str | None = None


@dataclass
class Report:
    """What node 0 concludes."""

    nodes: list[NodeReport]
    all_reduce_gigabytes_per_second: float | None = None
    """Bus bandwidth of an all-reduce over all ranks: 2 (n - 1) / n × bytes / seconds, as nccl-tests define it."""
    seconds: float = 0.0
    bad_nodes: list[str] = field(default_factory=list)


def conclude(report: Report) -> Report:
    """Names the bad nodes: those with a problem, and those far slower than the median of all."""
    speeds = [node.gigabytes_per_second for node in report.nodes if node.gigabytes_per_second]
    # Of two nodes none can be told to be the slow one.
    median = statistics.median(speeds) if len(speeds) > 2 else 0.0
    for node in report.nodes:
        if node.problem is None and node.gigabytes_per_second and node.gigabytes_per_second < SLOW * median:
            node.problem = f"{node.gigabytes_per_second:.2f} GB/s to its neighbours, where the median is {median:.2f}"
    if any(node.problem and not _taken_along(node) for node in report.nodes):
        for node in filter(_taken_along, report.nodes):
            node.problem = None
    report.bad_nodes = [node.host or str(node.node) for node in report.nodes if node.problem]
    return report


def _taken_along(node: NodeReport) -> bool:
    return any(sign in (node.problem or "") for sign in LOST_PEER)


def run_preflight(place: Place, limit: float, records: Path | None, as_json: bool, say: Callable[[str], None]) -> None:
    """Runs the check on this node; node 0 prints what was found.

    Args:
        records: where it leaves `preflight.json`, and `bad-nodes` with one name a line.
        limit: seconds within which the nodes have to come and to exchange data.

    Raises:
        StageError: status NODE_FAILED, the line names the bad nodes.
    """
    from torch.distributed import DistError, TCPStore

    began = time.monotonic()
    try:
        store = TCPStore(
            place.address, place.port, is_master=place.rank == 0, timeout=timedelta(seconds=limit), wait_for_workers=False
        )
    except DistError:
        raise StageError(
            NODE_FAILED, f"preflight: node 0 does not answer at TCP port {place.port} of {place.address} within {limit:.0f} s"
        ) from None
    store.set(f"node{place.rank}", json.dumps(asdict(_look_here(place))))
    if place.rank:
        report = _follow(store, place, limit)
    else:
        report = _lead(store, place, limit)
        report.seconds = round(time.monotonic() - began, 1)
        store.set("report", json.dumps(asdict(report)))
        _await_keys(store, [f"left{node.node}" for node in report.nodes[1:] if node.host], 5.0)
        _show(report, place, records, as_json, say)
    if report.bad_nodes:
        raise StageError(NODE_FAILED, f"bad nodes: {', '.join(report.bad_nodes)}")


def _look_here(place: Place) -> NodeReport:
    found = gpus()
    problem = (
        f"{found} GPUs where {place.processes} are needed" if place.on_gpus and found < place.processes else _memory_errors()
    )
    return NodeReport(place.rank, host_name(), found, problem=problem)


def _memory_errors() -> str | None:
    """Returns which GPUs have lost bits that ECC could not correct since the driver was loaded; None where none or unknown."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()
            return f"nvidia-smi fails: {lines[-1] if lines else f'status {done.returncode}'}"
        rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
        bad = [index.strip() for index, count in rows if count.strip().isdigit() and int(count)]
        return f"uncorrectable memory errors on GPU {', '.join(bad)}" if bad else None
    return "nvidia-smi does not answer"


def _lead(store: Any, place: Place, limit: float) -> Report:
    keys = [f"node{node}" for node in range(place.nodes)]
    come = _await_keys(store, keys, limit)
    names = _slurm_names()
    report = Report([NodeReport(**json.loads(store.get(key))) for key in keys if key in come])
    for node, key in enumerate(keys):
        if key not in come:
            name = names[node] if node < len(names) else None
            report.nodes.insert(node, NodeReport(node, name, problem=f"has not come within {limit:.0f} s"))
    go = not any(node.problem for node in report.nodes)
    store.set("go", "1" if go else "0")
    if go:
        _exchange(store, place, limit, report)
    return conclude(report)


def _follow(store: Any, place: Place, limit: float) -> Report:
    from torch.distributed import DistError

    try:
        store.wait(["go"], timedelta(seconds=2 * limit))
        if store.get("go") == b"1":
            _run_ranks(store, place, limit)
        store.wait(["report"], timedelta(seconds=3 * limit))
        report = json.loads(store.get("report"))
    except DistError:
        raise StageError(NODE_FAILED, f"preflight: node 0 at {place.address} is gone") from None
    with contextlib.suppress(DistError):
        store.set(f"left{place.rank}", "1")
    return Report(**{**report, "nodes": [NodeReport(**node) for node in report["nodes"]]})


def _exchange(store: Any, place: Place, limit: float, report: Report) -> None:
    """Starts the ranks of node 0 and fills the report with what all ranks have measured."""
    _run_ranks(store, place, limit)
    keys = [f"ranks{node}" for node in range(place.nodes)]
    come = _await_keys(store, keys, limit)
    for node, key in zip(report.nodes, keys, strict=True):
        node.problem = (json.loads(store.get(key)) or None) if key in come else f"its ranks do not end within {limit:.0f} s"
    if store.check(["measured"]):
        measured = json.loads(store.get("measured"))
        report.all_reduce_gigabytes_per_second = measured["all_reduce"]
        for node, speed in zip(report.nodes, measured["nodes"], strict=True):
            node.gigabytes_per_second = speed


def _run_ranks(store: Any, place: Place, limit: float) -> None:
    """Runs this node's ranks to their end and leaves what went wrong with them in the store."""
    common = {**os.environ, **network(place), "MASTER_ADDR": place.address, "MASTER_PORT": str(place.port)}
    common |= {"WORLD_SIZE": str(place.total), "BOTHWAYS_NODES": str(place.nodes), "OMP_NUM_THREADS": "1"}
    processes = []
    for local in range(place.processes):
        numbers = {"RANK": str(place.rank * place.processes + local), "LOCAL_RANK": str(local)}
        command = [sys.executable, "-m", "launch.nodes.preflight_rank", str(limit)]
        processes.append(subprocess.Popen(command, env=common | numbers, stderr=subprocess.PIPE, text=True))
    problem = ""
    give_up = time.monotonic() + 2 * limit
    for local, process in enumerate(processes):
        try:
            _, error = process.communicate(timeout=max(1.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            error = f"no answer within {2 * limit:.0f} s"
            process.communicate()
        if process.returncode and not problem:
            problem = f"rank {place.rank * place.processes + local}: {(error.strip().splitlines() or ['killed'])[-1]}"
    store.set(f"ranks{place.rank}", json.dumps(problem))


def _await_keys(store: Any, keys: list[str], limit: float) -> list[str]:
    """Returns those of the keys that come into the store within the limit."""
    give_up = time.monotonic() + limit
    while True:
        come = [key for key in keys if store.check([key])]
        if len(come) == len(keys) or time.monotonic() > give_up:
            return come
        time.sleep(0.1)


def _slurm_names() -> list[str]:
    """Returns the names of the nodes of a Slurm job in the order of their numbers, else nothing."""
    if "SLURM_JOB_NODELIST" not in os.environ or not shutil.which("scontrol"):
        return []
    done = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


def _show(report: Report, place: Place, records: Path | None, as_json: bool, say: Callable[[str], None]) -> None:
    text = json.dumps(asdict(report), indent=1)
    if records:
        records.mkdir(parents=True, exist_ok=True)
        (records / "preflight.json").write_text(text + "\n")
        (records / "bad-nodes").write_text("".join(f"{name}\n" for name in report.bad_nodes))
    if as_json:
        say(text)
        return
    for node in report.nodes:
        speed = f", {node.gigabytes_per_second:.2f} GB/s to its neighbours" if node.gigabytes_per_second else ""
        name = f"node {node.node}" + (f" ({node.host})" if node.host else "")
        say(f"{name}: {node.problem or 'fit'}; {node.gpus} GPUs{speed}")
    if report.all_reduce_gigabytes_per_second:
        bandwidth = f"{report.all_reduce_gigabytes_per_second:.2f} GB/s bus bandwidth"
        say(f"all-reduce of {MEGABYTES} MB over {place.total} ranks: {bandwidth} ({report.seconds:.0f} s in all)")
