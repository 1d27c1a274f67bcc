"""Making a corpus, and reading one: its speed beside the bare tokenizer's, its memory, and its start, while the texts grow.

The texts are the demo's reviews, written as JSON lines. A corpus of a hundred shards has one shard under a hundred names: what
matters to the start is how many there are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.figures import ROOT, Figure, figure, head, write_result
from benchmarks.pretrain_objectives import REVIEWS
from engine.config import Recipe
from engine.data.cells import text_cell
from engine.data.corpus import CHUNK
from engine.data.shards import CORPUS_FILE, Builder, Shards
from engine.data.sources import SourceConfig, read_rows
from engine.data.splits import DataConfig
from engine.intervals import median_interval
from engine.stages.stage import read_stage

ROUNDS = 5
VOCABULARY = 8192
SHARDS = {"1x": 1, "100x": 100}
COPIES = {"1x": 1, "10x": 10}
SHAPE = {"layers": 4, "hidden": 256, "heads": 4, "positions": 128}
LENGTH, BATCH = 128, 64
STEPS = 40


def write_reviews(path: Path) -> list[str]:
    """Writes the reviews, a row each, and returns them."""
    source = SourceConfig.model_validate({**REVIEWS, "share": "50%"})
    texts = [str(row["text"]) for row in read_rows(source, Recipe.here(), {"text": text_cell})]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def stage_of(scratch: Path, name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Runs one stage and returns its record."""
    recipe = scratch / "recipe.yaml"
    before = yaml.safe_load(recipe.read_text()) if recipe.exists() else {"name": "corpus", "stages": {}}
    before["stages"][name] = section
    recipe.write_text(yaml.safe_dump(before, sort_keys=False))
    command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--stage", name, "--runs", str(scratch / "runs")]
    subprocess.run(command, cwd=ROOT, check=True)
    record = read_stage(scratch / "runs" / "corpus" / name)
    assert record is not None
    return record


def speeds(texts: list[str], rows: Path, tokenizer: Any, scratch: Path, rounds: int) -> dict[str, Figure]:
    """Compares the shards of a file with its texts in memory given to the bare tokenizer, in turns."""
    data = DataConfig.model_validate({"train": str(rows), "validation": "1%"})
    bare, ours = np.empty(rounds), np.empty(rounds)
    chunks = [texts[first : first + CHUNK] for first in range(0, len(texts), CHUNK)]
    tokens = 0
    for number in range(rounds):
        started = time.perf_counter()
        tokens = sum(len(one.ids) for chunk in chunks for one in tokenizer.encode_batch_fast(chunk, add_special_tokens=False))
        bare[number] = tokens / (time.perf_counter() - started)
        builder = Builder(data, Recipe.here(), "text", tokenizer, scratch / f"shards{number}", False)
        started = time.perf_counter()
        builder.together(0, 1, lambda: None)
        ours[number] = tokens / (time.perf_counter() - started)
        print(f"{bare[number]:,.0f} tokens/s bare, {ours[number]:,.0f} as shards", flush=True)
    assert sum(Shards(builder.directory, split).ledger["tokens"] for split in ("train", "validation")) == tokens
    return {
        "shard_tokens_per_second": figure(median_interval(ours), "tokens/s", rounds),
        "tokenizer_ceiling_share": figure(median_interval(ours / bare), "ratio", rounds),
    }


def loading(scratch: Path, rounds: int) -> dict[str, Figure]:
    """Compares how fast rows are made, on one thread, with how fast a small BERT learns them."""
    train = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-3, "dropout": 0.0, "evaluate_every": STEPS}
    section = {"corpus": "text1x", "model": SHAPE, "sequence_length": LENGTH, "train": train}
    stage_of(scratch, "base", {"pretrain": section})
    history = (scratch / "runs/corpus/base/history.jsonl").read_text().splitlines()
    learnt = [record["tokens_per_second"] for record in map(json.loads, history) if record.get("tokens_per_second")]
    batches = batches_of(scratch / "runs/corpus/text1x/corpus", scratch / "runs/corpus/text1x")
    made = []
    for step in range(1, 10 * rounds + 1):
        started = time.perf_counter()
        tokens = sum(batch["tokens"] for batch in batches.at(step, 0, 1, BATCH))
        made.append(tokens / (time.perf_counter() - started))
    return {"loader_over_training": figure(float(np.median(made) / np.median(learnt)), "×", len(made))}


def batches_of(corpus: Path, tokenizer: Path) -> Any:
    """Returns the rows of a corpus as masked language modelling learns them."""
    from engine.data.packed import PackedBatches
    from engine.models import load_tokenizer
    from engine.objectives import default_objective, objective_class

    loaded, config = load_tokenizer(tokenizer), default_objective()
    objective = objective_class(config).of_tokenizer(config, loaded)
    return PackedBatches({"text": Shards(corpus, "train")}, objective, loaded, LENGTH, BATCH, 0)


def starts(scratch: Path, rounds: int) -> Iterator[tuple[str, Figure]]:
    """Yields how long it takes from nothing opened to the first batch, on one process, with one shard and with a hundred."""
    made = scratch / "runs/corpus/text1x"
    about = json.loads((made / "corpus" / CORPUS_FILE).read_text())
    (shard,) = about["train"]["shards"]
    found: dict[str, list[float]] = {size: [] for size in SHARDS}
    for size, count in SHARDS.items():
        directory = scratch / f"many{size}"
        directory.mkdir()
        for number in range(count):
            os.symlink(made / "corpus" / shard, directory / f"{number:05}")
        about["train"]["shards"] = [f"{number:05}" for number in range(count)]
        (directory / CORPUS_FILE).write_text(json.dumps(about))
    for _ in range(rounds):
        for size in SHARDS:
            started = time.perf_counter()
            batches_of(scratch / f"many{size}", made).at(0, 0, 1, BATCH)
            found[size].append(time.perf_counter() - started)
    for size, seconds in found.items():
        yield f"start_seconds_{size}", figure(median_interval(np.array(seconds)), "s", rounds)


def measure(rounds: int) -> dict[str, Figure]:
    """Returns all figures."""
    from engine.models import load_tokenizer

    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = scratch / "reviews.jsonl"
        texts = write_reviews(rows)
        for size, copies in COPIES.items():
            many = [str(scratch / f"reviews{number}.jsonl") for number in range(copies)]
            for path in many:
                Path(path).unlink(missing_ok=True)
                os.link(rows, path)
            learnt = {"train": {"vocab_size": VOCABULARY, "documents": 4000}}
            section = {"tokenizer": learnt, "data": {"train": many, "validation": "1%"}, "shard_tokens": 10**9}
            record = stage_of(scratch, f"text{size}", {"corpus": section})
            figures[f"peak_rss_mb_{size}"] = figure(record["peak_memory_bytes"] / 1e6, "MB")
        tokenizer = load_tokenizer(scratch / "runs/corpus/text1x").backend_tokenizer
        figures |= speeds(texts, rows, tokenizer, scratch, rounds)
        figures |= loading(scratch, rounds)
        figures |= dict(starts(scratch, rounds))
    return figures


def main(argv: list[str]) -> None:
    """Measures, and writes results/corpus.json."""
    parser = argparse.ArgumentParser("python -m benchmarks corpus", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"times that each is measured (default: {ROUNDS})")
    rounds = parser.parse_args(argv).rounds
    print(write_result("corpus", "python -m benchmarks corpus", head(), measure(rounds)), flush=True)
