"""What 10^12 tokens on 64 nodes of 8 GPUs would take of the data path: from constants that are measured here, on one machine.

A shard of the full size is made of random tokens in documents of random lengths, 500 tokens on average, and packed into rows of
2,048; the order is that of all shards. What no machine here can measure is given as an assumption: `--bandwidth`, `--mfu`.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.figures import Figure, figure, head, write_result
from engine.data.corpus import Corpus
from engine.data.order import WINDOW, RowOrder
from engine.data.packed import PackedBatches, PackedShard
from engine.data.shards import SHARD_TOKENS
from engine.objectives import Frame, default_objective, objective_class

TOKENS, NODES, GPUS = 10**12, 64, 8
LENGTH, BATCH, DOCUMENT = 2048, 2048, 500
PARAMETERS, PEAK = 7e9, 989e12
"""Of the model, and of an H100's bf16 products, as its data sheet has it."""
STATE_BYTES = 12
"""A checkpoint holds fp32 weights and Adam's two averages."""
VOCABULARY, SPECIAL = 32_000, 5
ROUNDS = 5


class Tokens:
    """What an objective asks of a tokenizer."""

    pad_token_id, cls_token_id, sep_token_id, mask_token_id = 0, 2, 3, 4
    all_special_ids = tuple(range(SPECIAL))

    def __len__(self) -> int:
        return VOCABULARY


def shard() -> Corpus:
    """Returns a shard of the full size."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.geometric(1 / DOCUMENT, SHARD_TOKENS // DOCUMENT))
    ends = np.cumsum(lengths)
    return Corpus(rng.integers(SPECIAL, VOCABULARY, ends[-1], dtype=np.uint16), ends)


def timed(work: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Returns the median of some runs, in seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def traced(work: Callable[[], Any]) -> tuple[int, Any]:
    """Returns (bytes that the result of `work` keeps, the result)."""
    gc.collect()
    tracemalloc.start()
    result = work()
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return kept, result


def measure(bandwidth: float, mfu: float) -> dict[str, Figure]:
    """Returns what is measured, then what follows from it.

    Args:
        bandwidth: bytes a second that a node writes to the file system that all share.
        mfu: share of the GPUs' peak that training reaches.
    """
    ranks = NODES * GPUS
    corpus, config = shard(), default_objective()
    objective = objective_class(config).of_tokenizer(config, Tokens())
    frame = Frame((Tokens.cls_token_id,), (Tokens.sep_token_id,))

    def opened() -> PackedShard:
        packed = PackedShard(corpus, objective, frame, LENGTH, 0)
        packed.packed.row(0, 0)
        return packed

    open_seconds = timed(opened)
    shard_bytes, packed = traced(opened)
    shards = -(-TOKENS // int(corpus.ends[-1]))
    sizes = np.full(shards, len(packed.packed))
    order = RowOrder([sizes], [1.0], BATCH, 1)
    steps = order.steps_per_epoch

    def sought() -> Any:
        again = RowOrder([sizes], [1.0], BATCH, 1)
        again.at(2 * steps // 3)
        return again

    seek_seconds = timed(sought)
    order_bytes, _ = traced(sought)
    batches = PackedBatches({"": [corpus]}, objective, Tokens(), LENGTH, 16, 0)
    batches.at(0, 0, 1, 16)
    places = iter(range(1, 10**6))
    loader = 16 * LENGTH / timed(lambda: batches.at(next(places), 0, 1, 16), 10 * ROUNDS)
    checkpoint = PARAMETERS * STATE_BYTES
    seconds = 6 * PARAMETERS * TOKENS / (ranks * PEAK * mfu)
    on_disk = corpus.tokens.nbytes + corpus.ends.nbytes
    return {
        "open_shard_seconds": figure(open_seconds, "s", ROUNDS),
        "shard_index_mb": figure(shard_bytes / 1e6, "MB"),
        "seek_seconds": figure(seek_seconds, "s", ROUNDS),
        "order_mb": figure(order_bytes / 1e6, "MB"),
        "loader_tokens_per_second": figure(loader, "tokens/s", 10 * ROUNDS),
        "shards": figure(shards, "shards"),
        "documents": figure(shards * len(corpus.ends), "documents"),
        "corpus_tb": figure(shards * on_disk / 1e12, "TB"),
        "steps": figure(steps, "steps"),
        "rank_index_mb": figure((2 * WINDOW * shard_bytes + order_bytes) / 1e6, "MB"),
        "start_seconds": figure(open_seconds * (shards / ranks + WINDOW) + seek_seconds, "s"),
        "checkpoint_gb": figure(checkpoint / 1e9, "GB"),
        "checkpoint_seconds": figure(checkpoint / NODES / bandwidth, "s"),
        "training_hours": figure(seconds / 3600, "h"),
        "loader_over_training": figure(loader / (TOKENS / seconds / ranks), "×"),
    }


def main(argv: list[str]) -> None:
    """Measures, and writes results/scale.json."""
    parser = argparse.ArgumentParser("python -m benchmarks scale", description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=2e9, help="bytes/s that a node writes (default: %(default)g)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default: %(default)g)")
    chosen = parser.parse_args(argv)
    print(write_result("scale", "python -m benchmarks scale", head(), measure(chosen.bandwidth, chosen.mfu)), flush=True)
