"""Run directories as the stages leave them, with made-up numbers."""

import json
import math
from pathlib import Path

from engine.stages.stage import digest

TASK = {"type": "classification", "text": "text", "text_pair": None, "label": "label", "names": {}}
METRIC = {"name": "accuracy", "higher_is_better": True, "unit": "%", "counted": True}
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.32.0"}


def write_stage(run: Path, name: str, kind: str, reads: dict[str, str] | None = None, order: int = 0, **facts):
    """Writes runs/<run>/<name>/stage.json; `reads` is {key: stage or anything else}."""
    inputs = {}
    for key, reference in (reads or {}).items():
        made = run / reference / "stage.json"
        files = json.loads(made.read_text())["files"] if made.exists() else {"x": reference}
        inputs[key] = {"reference": reference, "sha256": digest(files)}
    record = {
        "stage": name,
        "kind": kind,
        "recipe": run.name,
        "section": {"task": TASK, "max_length": 128},
        "seed": 1,
        "inputs": inputs,
        "fingerprint": digest(name),
        "versions": VERSIONS,
        "machine": {"cpu_count": 2, "platform": "Linux-6.1-x86_64", "instructions": ["AVX2", "VNNI"]},
        "finished": f"2026-11-20T10:{order:02d}:00Z",
        "peak_memory_bytes": 1_400_000_000 + order * 10_000_000,
        **({"metric": METRIC} if "accuracy" in str(facts.get("metrics")) else {}),
        **facts,
        "files": {"model.safetensors": {"sha256": digest([name, order]), "bytes": facts.get("weight_bytes", 0)}},
    }
    (run / name).mkdir(parents=True, exist_ok=True)
    (run / name / "stage.json").write_text(json.dumps(record))


def classified(right: int, examples: int = 1000) -> dict[str, float]:
    accuracy = 100 * right / examples
    return {"accuracy": accuracy, "f1_macro": accuracy - 0.1, "loss": 1.1 - accuracy / 125, "examples": examples}


def write_predictions(stage: Path, right: int, examples: int = 1000) -> None:
    """The first `right` of `examples` are classified right."""
    rows = [{"id": f"{i:04d}", "label": "good", "prediction": "good" if i < right else "bad"} for i in range(examples)]
    (stage / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_history(stage: Path, steps: int, evaluations: int, start: float, end: float, accuracy: float | None) -> None:
    lines = []
    for evaluation in range(evaluations + 1):
        step = steps * evaluation // evaluations
        values = {"loss": end + (start - end) * math.exp(-5 * evaluation / evaluations)}
        if accuracy is not None:
            values["accuracy"] = accuracy - (accuracy - 50) * math.exp(-4 * evaluation / evaluations)
        lines.append({"step": step, "validation": values})
    for step in range(10, steps + 1, 10):
        wiggle = 0.04 * math.sin(step * 1.7) * (start - end)
        loss = end + (start - end) * math.exp(-5 * step / steps) + wiggle
        lines.append(
            {"step": step, "loss": loss, "learning_rate": 1e-4, "tokens_per_second": 9000.0, "grad_norm": 1.0, "seconds": 1.0}
        )
    lines.sort(key=lambda line: line["step"])
    (stage / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_demo_run(run: Path) -> Path:
    """The chain of recipes/demo.yaml; every number is invented."""
    trained = {"stopped": None, "processes": "2 processes, zero2, bf16"}
    write_stage(
        run, "pretrained", "pretrain", {"data.train.path": "package:texts/imdb.csv"}, 1,
        metrics={"validation": {"loss": 4.91, "perplexity": 135.6, "predicted_tokens": 41_000.0, "initial_loss": 10.36}},
        parameters=7_700_000, weight_bytes=30_800_000, steps=900, best_step=900,
        seconds={"training": 190.0, "this_run": 221.0}, **trained,
    )  # fmt: skip
    write_history(run / "pretrained", 900, 4, 10.36, 4.91, None)
    plan = [
        # name, kind, reads, right, parameters, bytes, steps
        ("downstream_random", "finetune", {"model": "pretrained"}, 705, 7_700_000, 30_800_000, 400),
        ("downstream_pretrained", "finetune", {"model": "pretrained"}, 748, 7_700_000, 30_800_000, 400),
        ("teacher", "finetune", {"model": "package:minilm/model"}, 866, 22_700_000, 90_900_000, 640),
        ("student", "distill", {"teacher": "teacher"}, 861, 17_400_000, 69_500_000, 900),
        ("slim", "prune", {"model": "student"}, 842, 14_000_000, 56_000_000, 0),
        ("recovered", "distill", {"teacher": "teacher", "student.model": "slim"}, 859, 14_000_000, 56_000_000, 500),
        ("int8", "quantize", {"model": "recovered"}, 857, 14_000_000, 14_900_000, 0),
    ]
    for order, (name, kind, reads, right, parameters, size, steps) in enumerate(plan, 2):
        facts = {"steps": steps, "best_step": steps // 4 * 3, "seconds": {"training": steps * 0.17, "this_run": steps * 0.2}}
        facts = {**facts, **trained} if steps else {"seconds": {"this_run": 9.3}}
        write_stage(
            run, name, kind, reads, order,
            metrics={"validation": classified(right + 4), "test": classified(right)},
            parameters=parameters, weight_bytes=size, **facts,
        )  # fmt: skip
        write_predictions(run / name, right)
        if steps:
            write_history(run / name, steps, 8, 0.72, 0.29, right / 10 + 0.4)
    write_export(run)
    return run


def write_export(run: Path) -> None:
    times = [
        ("teacher", "torch", "fp32", 14.1), ("teacher", "onnxruntime", "fp32", 6.9), ("student", "onnxruntime", "fp32", 3.6),
        ("slim", "onnxruntime", "fp32", 2.5), ("recovered", "onnxruntime", "fp32", 2.5), ("engine", "onnxruntime", "int8", 1.3),
    ]  # fmt: skip
    engines = {}
    for stage, runtime, precision, ms in times:
        suffix = "engine" if stage == "engine" else {"torch": "torch", "onnxruntime": "onnx"}[runtime] + "-fp32"
        entry = {"stage": stage, "runtime": runtime, "precision": precision}
        engines[f"{stage}/{suffix}"] = {**entry, "median_ms": ms, "low": ms * 0.97, "high": ms * 1.04, "p95_ms": ms * 1.9}
    write_stage(
        run, "engine", "export", {"model": "int8", "baseline": "teacher"}, 30,
        metrics={"validation": classified(860), "test": classified(857)}, parameters=14_000_000, weight_bytes=14_900_000,
        benchmark={"threads": 2, "inputs": 256, "rounds": 15, "engines": engines},
        comparison={
            "baseline": "teacher",
            "accuracy_drop_points": {"value": 0.9, "low": -0.2, "high": 2.0, "n": 1000},
            "speedup_vs_torch_fp32": {"value": 10.8, "low": 10.4, "high": 11.2, "n": 15},
            "speedup_vs_onnx_fp32": {"value": 5.3, "low": 5.1, "high": 5.5, "n": 15},
            "weight_bytes_ratio": 0.164,
        },
        seconds={"this_run": 61.0},
    )  # fmt: skip
    (run / "engine" / "manifest.json").write_text(json.dumps({"format": 1, "name": run.name}))
