"""fastText beside the int8 engine of this project, on the same rows: accuracy, and microseconds a text from text to label.

Both take one text at a time and one thread; they are timed in turns. The sets are not part of this project: `--data DIR` names a
directory with clinc150/ and sst2/ in their own formats. fastText comes by `pip install fasttext-numpy2-wheel`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Figure, figure, head, merge_result
from benchmarks.finetune_quality import MODEL, STAGE, TEACHER_HELP, arguments, chosen_cases, stage_of
from engine.config import load_recipe
from engine.errors import UserError
from engine.intervals import accuracy_interval, median_interval
from export.engines.benchmark import Candidate, measure

ROUNDS, TEXTS = 40, 500
INT8, ENGINE = "int8", "engine"
WORD = re.compile(r"\w+|[^\w\s]")
FASTTEXT = {"epoch": 25, "lr": 0.5, "wordNgrams": 2, "thread": 2, "verbose": 0, "seed": 1}
"""As fastText's own tutorial for supervised classification ends: 25 epochs, bigrams."""


def words_of(text: str) -> str:
    """Returns a text as fastText's tutorial prepares it: lower case, punctuation apart."""
    return " ".join(WORD.findall(text.lower()))


def engine_of(stage: dict[str, Any], runs: Path, name: str) -> tuple[Any, Any]:
    """Trains, quantizes and exports (what is finished is taken from `runs`); returns (the bundle, the rows of all splits)."""
    from engine.data.rows import prepare_for_model
    from export.serving.bundle import Bundle
    from launch.pipeline import run_recipe
    from launch.recipe import load_stages

    stages = {
        STAGE: stage,
        INT8: {"quantize": {"model": STAGE}},
        ENGINE: {"export": {"model": INT8, "baseline": STAGE, "backends": ["onnxruntime"]}},
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{name}.yaml")
        path.write_text(json.dumps({"name": name, "seed": 1, "stages": stages}))
        run_recipe(path, runs=runs)
        quantized = next(stage for stage in load_stages(load_recipe(path, runs=runs)) if stage.name == INT8)
        data_of = prepare_for_model(quantized.config, quantized.recipe, runs / name / STAGE)
    return Bundle.open(runs / name / ENGINE, threads=1), data_of


def fasttext_of(rows: Any, text: str, label: str) -> Callable[[str], str]:
    """Returns a function from a text to its label, trained on rows.

    Raises:
        UserError: fastText is not installed.
    """
    try:
        import fasttext
    except ImportError:
        raise UserError("fastText is not installed: pip install fasttext-numpy2-wheel") from None
    names = sorted({str(row[label]) for row in rows})
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"__label__{names.index(str(row[label]))} {words_of(row[text])}\n" for row in rows)
        file.flush()
        model = fasttext.train_supervised(file.name, **FASTTEXT)
    return lambda given: names[int(model.predict(words_of(given))[0][0].removeprefix("__label__"))]


def figures_of(name: str, stage: dict[str, Any], runs: Path) -> dict[str, Figure]:
    """Returns the figures of one set."""
    bundle, prepared = engine_of(stage, runs, f"quality_{name}")
    text, label = prepared.task.config.text, prepared.task.config.label
    rows = list(prepared.rows["test"])
    peer = fasttext_of([*prepared.rows["train"], *prepared.rows["validation"]], text, label)
    right = {
        "fasttext": [peer(str(row[text])) == str(row[label]) for row in rows],
        "engine": [answer["label"] == str(row[label]) for answer, row in zip(bundle.predict(rows), rows, strict=True)],
    }
    texts = [str(row[text]) for row in rows[:TEXTS]]
    candidates = [
        Candidate("fasttext", name, "fasttext", "fp32", peer),
        Candidate("engine", name, "onnxruntime", "int8", lambda given: bundle.predict([{text: given}])),
    ]
    times = measure(candidates, texts, ROUNDS)
    found = {}
    for which in ("fasttext", "engine"):
        found[f"{which}_{name}_accuracy"] = figure(accuracy_interval(np.asarray(right[which])), "%", len(rows))
        found[f"{which}_{name}_us"] = figure(median_interval(times[which] * 1e3), "µs", ROUNDS)
    return found


def main(argv: list[str]) -> None:
    """Measures, and writes results/baselines.json."""
    parser = arguments("baselines", __doc__)
    parser.add_argument("--teacher", metavar="MODEL", help=TEACHER_HELP)
    chosen = parser.parse_args(argv)
    data = chosen.data.resolve()
    for name, case in chosen_cases(chosen.only, data, ["clinc150", "sst2"]):
        found = figures_of(name, stage_of(name, case, data, MODEL, chosen.teacher), chosen.runs)
        print(merge_result("baselines", f"python -m benchmarks baselines --data {data.name}", head(), found))
