"""Tiny recipes with real models and data, made on the spot: a training run takes seconds."""

import importlib
import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

from engine.config import load_recipe
from engine.stages.stage import Stage
from launch.recipe import KINDS
from launch.resume_check import CLOCKS
from tests.unit.models import WORDS, tiny_classifier, tiny_tokenizer


def write_model(directory: Path, **shape) -> Path:
    """A model directory with random weights, large enough to learn from in a few steps: two layers, 64 positions.

    It is a classifier of the labels of `ragged_rows`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    named = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    tiny_classifier(**{"initializer_range": 0.2, **named, **shape}).save_pretrained(directory)
    tiny_tokenizer(directory).save_pretrained(directory)
    return directory


def ragged_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of 1 to 20 words, every third of which speaks for the label on average."""
    rng = np.random.default_rng(seed)
    opinions = (["bad", "dull", "cold"], ["good", "great", "warm"])
    neutral = [word for word in WORDS if word not in (*opinions[0], *opinions[1])]
    rows = []
    for label in rng.integers(0, 2, count):
        words = [rng.choice(opinions[label] if rng.random() < 1 / 3 else neutral) for _ in range(rng.integers(1, 21))]
        rows.append({"text": " ".join(words), "label": int(label)})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_commands(directory: Path, count: int, seed: int = 0) -> Path:
    """Sentences with an intent, in a directory with seq.in, seq.out and label: WORK and PLACE as `write_sentences` has them.

    The intent is `blame` where a word says so, else `praise`; every tenth sentence is long.
    """
    rng = np.random.default_rng(seed)
    adjectives, nouns, blames = ("good", "great", "warm"), ("film", "story"), ("bad", "dull", "cold")
    others = [word for word in WORDS if word not in (*adjectives, *nouns, *blames, "plot")]
    lines: list[tuple[str, str, str]] = []
    for _ in range(count):
        pairs: list[tuple[str, str]] = []
        for _ in range(rng.integers(1, 6) if rng.random() < 0.9 else 24):
            kind = rng.random()
            if kind < 0.3:
                pairs += [(rng.choice(adjectives), "B-WORK"), (rng.choice(nouns), "I-WORK")]
            else:
                pairs.append(("plot", "B-PLACE") if kind < 0.5 else (rng.choice(others), "O"))
        blamed = rng.random() < 0.5
        if blamed:
            at = [place for place in range(len(pairs) + 1) if place == len(pairs) or not pairs[place][1].startswith("I")]
            pairs.insert(int(rng.choice(at)), (rng.choice(blames), "O"))
        words, tags = zip(*pairs, strict=True)
        lines.append((" ".join(words), " ".join(tags), "blame" if blamed else "praise"))
    directory.mkdir(parents=True, exist_ok=True)
    for name, column in zip(("seq.in", "seq.out", "label"), zip(*lines, strict=True), strict=True):
        (directory / name).write_text("\n".join(column) + "\n")
    return directory


def write_sentences(path: Path, count: int, seed: int = 0) -> Path:
    """Sentences in columns: an adjective with its noun is a WORK, `plot` alone a PLACE; every tenth sentence is long."""
    rng = np.random.default_rng(seed)
    adjectives, nouns = ("good", "great", "warm"), ("film", "story")
    others = [word for word in WORDS if word not in (*adjectives, *nouns, "plot")]
    lines = []
    for _ in range(count):
        for _ in range(rng.integers(1, 9) if rng.random() < 0.9 else 25):
            kind = rng.random()
            if kind < 0.25:
                lines += [f"{rng.choice(adjectives)} B-WORK", f"{rng.choice(nouns)} I-WORK"]
            elif kind < 0.4:
                lines.append("plot B-PLACE")
            else:
                lines.append(f"{rng.choice(others)} O")
        lines.append("")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_questions(path: Path, count: int, seed: int = 0, without: float = 0.2) -> Path:
    """Questions as SQuAD 2.0 has them: an adjective with its noun answers each; every tenth context is long.

    Args:
        without: share of the questions whose context has no such pair.
    """
    rng = np.random.default_rng(seed)
    adjectives, nouns = ("good", "great", "warm"), ("film", "story")
    others = [word for word in WORDS if word not in (*adjectives, *nouns)]
    paragraphs = []
    for number in range(count):
        words = rng.choice(others, rng.integers(2, 9) if rng.random() < 0.9 else 30).tolist()
        pair, place = [str(rng.choice(adjectives)), str(rng.choice(nouns))], int(rng.integers(0, len(words)))
        impossible = rng.random() < without
        before = " ".join(words[:place])
        context = " ".join(words if impossible else [*words[:place], *pair, *words[place:]])
        answers = [] if impossible else [{"text": " ".join(pair), "answer_start": len(before) + bool(before)}]
        question = {"id": f"q{number}", "question": f"{rng.choice(others)} was", "answers": answers, "is_impossible": impossible}
        paragraphs.append({"context": context, "qas": [question]})
    path.write_text(json.dumps({"version": "v2.0", "data": [{"title": "films", "paragraphs": paragraphs}]}))
    return path


def train_section(**changes) -> dict:
    return {
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "dropout": 0.0,
        "evaluate_every": 2,
        **changes,
    }


def finetune_section(**changes) -> dict:
    return {
        "model": "model",
        "task": {"type": "classification"},
        "data": {"train": "rows.jsonl", "validation": "25%", "test": "25%"},
        "max_length": 32,
        "train": train_section(),
        **changes,
    }


def corpus_section(**changes) -> dict:
    return {"tokenizer": "model", "data": {"train": "rows.jsonl", "validation": "25%"}, **changes}


def pretrain_section(**changes) -> dict:
    return {
        "model": {"layers": 2, "hidden": 32, "heads": 4, "positions": 64},
        "tokenizer": "model",
        "data": {"train": "rows.jsonl", "validation": "25%"},
        "sequence_length": 32,
        "train": train_section(),
        **changes,
    }


def write_recipe(directory: Path, stages: dict | None = None, name: str = "tiny") -> Path:
    """A recipe with its model and rows beside it; by default one fine-tuning stage, `teacher`."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "model").exists():
        write_model(directory / "model")
    if not (directory / "rows.jsonl").exists():
        write_rows(directory / "rows.jsonl", ragged_rows(64))
    path = directory / "recipe.yaml"
    stages = stages or {"teacher": {"finetune": finetune_section()}}
    path.write_text(yaml.safe_dump({"name": name, "stages": stages}, sort_keys=False))
    return path


def run_here(recipe: Path, name: str, runs: Path, *overrides: str) -> Stage:
    """Runs one stage in this process, on one thread: threads that wait for each other are slow on a busy machine."""
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    loaded = load_recipe(recipe, list(overrides), runs)
    kind = KINDS[loaded.stages[name][0]]
    stage = Stage(loaded, name, kind.config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        importlib.import_module(kind.module).run(stage)
    finally:
        torch.set_num_threads(threads)
    return stage


def read_weights(directory: Path) -> dict:
    return load_file(directory / "model.safetensors")


def read_history(directory: Path) -> list[dict]:
    """The records of history.jsonl without what a clock measured."""
    records = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
