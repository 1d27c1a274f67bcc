"""One rank of the preflight: it multiplies on its GPU and exchanges data, first with a neighbour, then with all ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

MEGABYTES = 64
"""Size of what is exchanged: a usual bucket of ZeRO."""
ROUNDS = 3
"""Exchanges of which the fastest counts; the first one opens connections."""
MATRIX = 4096
"""Rows and columns of the matrices that every GPU multiplies."""


def pairs(nodes: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of pairs in which every node meets its two neighbours in the ring, and no node twice in a round."""
    if nodes < 2:
        return []
    ring = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else 1)]
    even = [pair for pair in ring[::2] if not (nodes % 2 and pair == ring[-1])]
    odd = ring[1::2]
    return [part for part in (even, odd, [ring[-1]] if nodes % 2 and nodes > 2 else []) if part]


def main() -> None:
    """One rank: multiplies on its GPU, exchanges data, leaves what was measured in the store (rank 0)."""
    import torch
    import torch.distributed as dist

    limit, rank, world, nodes = float(sys.argv[1]), *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "BOTHWAYS_NODES"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        _multiply(device)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=limit)
    )
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("ranks", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=limit),
    )
    data = torch.ones(MEGABYTES * 2**20 // 4, device=device)
    speed = [0.0] * nodes
    per_node = world // nodes
    for turn in pairs(nodes):
        for pair in turn:
            if rank % per_node == 0 and rank // per_node in pair:
                other = pair[1 - pair.index(rank // per_node)] * per_node
                seconds = min(_timed(lambda: _swap(data, other)) for _ in range(ROUNDS))  # noqa: B023 - called at once
                speed[rank // per_node] = max(speed[rank // per_node], data.nbytes / 1e9 / seconds)
        dist.barrier()
    everybody = None
    if world > 1:
        seconds = min(_timed(lambda: dist.all_reduce(data)) for _ in range(ROUNDS))
        everybody = 2 * (world - 1) / world * data.nbytes / 1e9 / seconds
    speeds: list[Any] = [None] * world
    dist.all_gather_object(speeds, speed)
    if rank == 0:
        best = [max(speed[node] for speed in speeds) or None for node in range(nodes)]
        store.set("measured", json.dumps({"all_reduce": everybody, "nodes": best}))
    dist.barrier()
    dist.destroy_process_group()


def _swap(data: Any, other: int) -> None:
    import torch
    import torch.distributed as dist

    received = torch.empty_like(data)
    operations = [dist.P2POp(dist.isend, data, other), dist.P2POp(dist.irecv, received, other)]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


def _timed(work: Callable[[], Any]) -> float:
    _synchronize()
    began = time.monotonic()
    work()
    _synchronize()
    return time.monotonic() - began


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _multiply(device: Any) -> None:
    """Raises RuntimeError when a GPU multiplies wrongly."""
    import torch

    ones = torch.ones(MATRIX, MATRIX, device=device)
    if not bool((ones @ ones == MATRIX).all()):
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} multiplies matrices wrongly")


if __name__ == "__main__":
    main()
