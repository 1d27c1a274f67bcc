"""The export stage: a model becomes ONNX, engines, a benchmark and a bundle that checks itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.config import ModelRef, Strict
from engine.cpu import instructions
from engine.data.readers import Row
from engine.data.splits import DataConfig
from engine.stage import Stage, lineage, read_stage, stage_main
from engine.tasks import ClassificationConfig
from export.engines import Weights
from export.engines.parity import ParityGates

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from engine.tasks.classification import Classification, Example
    from export.benchmark import Arrays, Candidate

Backend = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
GOLDEN = 32
"""Golden inputs of a bundle."""
LATENCY_INPUTS = 200
"""Test rows of the latency benchmark."""


class ExportConfig(Strict):
    """Section of an `export` stage."""

    model: ModelRef
    """What to serve: a `quantize` stage (int8) or any stage or model directory (fp32)."""
    task: ClassificationConfig
    data: DataConfig
    """Training rows give the length histogram; test rows, or else validation rows, accuracy, latency and golden inputs."""
    backends: list[Backend] = ["onnxruntime"]
    """`onnxruntime` is always there: it is the embedded default."""
    baseline: ModelRef | None = None
    """The stage that accuracy and latency are compared with, usually the teacher."""
    gates: ParityGates = ParityGates()
    max_length: int = Field(128, ge=4)
    max_batch: int = Field(32, ge=1)
    """Largest batch of the engines' optimization profile and of the server."""
    threads: int = Field(2, ge=1)
    """Threads of the latency benchmark."""
    rounds: int = Field(40, ge=5)
    """Rounds of the latency benchmark."""


@dataclass(frozen=True)
class Source:
    """What is exported."""

    graph: onnx.ModelProto
    precision: str
    reference: Path | str
    """The float model that the graph was made from."""
    weights: Weights | None = None
    """Form of int8 weights."""


def find_source(stage: Stage[ExportConfig], path: Path | str, inputs: list[str]) -> Source:
    """Returns the int8 graph of a `quantize` stage, or the graph of a float model."""
    import onnx

    from engine.models import load_model
    from export.compress.quantize import MODEL_FILE
    from export.engines.graph import export_onnx, merge_projections

    record = read_stage(path) if isinstance(path, Path) else None
    # A model.onnx of somebody else may lie beside weights: only our own record says that it is their int8 graph.
    if isinstance(path, Path) and record is not None and record["kind"] == "quantize":
        before = record["inputs"]["model"]["reference"]
        beside = path.parent / before
        reference = beside if beside.is_dir() else stage.recipe.find_model(before)
        return Source(onnx.load(path / MODEL_FILE), "int8", reference, record["section"].get("weights", "8bit"))
    graph = export_onnx(load_model(path, "classification", attention="eager"), inputs)
    merge_projections(graph)
    return Source(graph, "fp32", path)


def build_engines(config: ExportConfig, source: Source, lengths: np.ndarray, directory: Path) -> dict[str, Path]:
    """Writes the ONNX file and compiles the other backends from it; returns {backend: file}.

    Raises:
        UserError: a backend's package is missing or refuses the model.
        RuntimeError: a matrix product of the network is not quantized as the graph says.
    """
    import onnx

    from engine.models import read_config
    from export.compress.quantize import tensorrt_form
    from export.engines.trt import Profile, build_engine, parse_network, quantized_matmuls, tensorrt_module

    engines = {"onnxruntime": directory / "model.onnx"}
    onnx.save(source.graph, engines["onnxruntime"])
    profile = Profile.of_lengths(lengths, config.max_batch, config.max_length)
    positions = read_config(source.reference).max_position_embeddings
    for backend in dict.fromkeys(config.backends):
        if backend == "onnxruntime":
            continue
        trt = tensorrt_module(backend)
        model = tensorrt_form(source.graph).SerializeToString()
        parsed = parse_network(trt, model)
        quantized, half = quantized_matmuls(trt, parsed.network)
        if half or bool(quantized) != (source.precision == "int8"):
            raise RuntimeError(f"{backend}: matrix products with two int8 inputs: {quantized}; with only one: {half}")
        engines[backend] = directory / f"{backend}.engine"
        engines[backend].write_bytes(build_engine(trt, parsed, profile, positions))
        print(f"  {backend}: {len(quantized)} int8 matrix products, shapes (batch, length) {profile.shapes()}", flush=True)
    return engines


def candidates_of(stage: Stage[ExportConfig], path: Path | str, engine: Candidate, inputs: list[str]) -> list[Candidate]:
    """Returns the engine, the baseline in PyTorch and ONNX Runtime, and the float stages on the way in ONNX Runtime."""
    from engine.models import load_model
    from export.benchmark import Candidate, torch_candidate
    from export.engines.graph import export_onnx
    from export.engines.ort import OrtEngine

    config = stage.config
    records = lineage(path) if isinstance(path, Path) else {}
    directories = {r["stage"]: d for d, r in records.items() if r["kind"] in ("finetune", "distill", "prune")}
    found = [engine]
    if config.baseline is not None:
        baseline = Path(stage.recipe.find_model(config.baseline))
        found.append(torch_candidate(config.baseline, baseline, inputs, config.threads))
        directories = {str(config.baseline): baseline, **directories}
    for name, directory in directories.items():
        graph = export_onnx(load_model(directory, "classification", attention="eager"), inputs)
        float_engine = OrtEngine(graph.SerializeToString(), config.threads)
        found.append(Candidate(f"{name}/onnx-fp32", name, "onnxruntime", "fp32", float_engine.run))
    return found


def run_benchmark(
    stage: Stage[ExportConfig], candidates: list[Candidate], inputs: list[Arrays]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures all candidates side by side.

    Returns:
        (the `benchmark` record, {"speedup_vs_torch_fp32", "speedup_vs_onnx_fp32"} of the engine over the baseline).
    """
    from engine.intervals import ratio_interval
    from export.benchmark import measure, summary

    config = stage.config
    times = measure(candidates, inputs, config.rounds)
    engines = {
        candidate.name: {
            "stage": candidate.stage,
            "runtime": candidate.runtime,
            "precision": candidate.precision,
            **summary(times[candidate.name]),
        }
        for candidate in candidates
    }
    for name, entry in engines.items():
        print(f"  {name}: {entry['median_ms']:.3f} ms at batch 1", flush=True)
    speedups = {
        key: {**ratio_interval(times[f"{config.baseline}/{kind}"], times[candidates[0].name])._asdict(), "n": config.rounds}
        for key, kind in (("speedup_vs_torch_fp32", "torch-fp32"), ("speedup_vs_onnx_fp32", "onnx-fp32"))
        if config.baseline is not None
    }
    record = {"threads": config.threads, "instructions": instructions(), "inputs": len(inputs), "rounds": config.rounds}
    return {**record, "engines": engines}, speedups


def compare(
    config: ExportConfig, baseline: Path, task: Classification, examples: list[Example], logits_NC: np.ndarray, size: int
) -> dict[str, Any]:
    """Returns what the engine loses and saves against the baseline: accuracy in points with its paired interval, weight bytes.

    Args:
        logits_NC: of the engine for `examples`.
        size: bytes of the engine's weights.
    """
    import numpy as np

    from engine.evaluate import evaluate_classifier
    from engine.intervals import paired_bootstrap_drop
    from engine.models import load_model, size_of

    labels_N = np.asarray([example["label"] for example in examples])
    model = load_model(baseline, "classification")
    _, baseline_NC = evaluate_classifier(model, task, examples)
    drop = paired_bootstrap_drop(baseline_NC.argmax(1) == labels_N, logits_NC.argmax(1) == labels_N)
    return {
        "baseline": config.baseline,
        "accuracy_drop_points": {**drop._asdict(), "n": len(examples)},
        "weight_bytes_ratio": size / size_of(model)["weight_bytes"],
    }


def golden_rows(config: ClassificationConfig, rows: list[Row], examples: list[Example], reference_NC: np.ndarray) -> list[Row]:
    """Returns GOLDEN rows spread evenly over the lengths, shortest and longest included, with the float model's logits."""
    import numpy as np

    order = np.argsort([len(example["input_ids"]) for example in examples], kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(GOLDEN, len(order))).astype(int)]
    columns = {"text": config.text, **({"text_pair": config.text_pair} if config.text_pair else {})}
    return [
        {**{key: str(rows[row][column]) for key, column in columns.items()}, "reference": reference_NC[row].tolist()}
        for row in chosen
    ]


def run(stage: Stage[ExportConfig]) -> None:
    """Runs one export stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import numpy as np

    from engine.data.rows import prepare_for_model
    from engine.evaluate import evaluate_classifier
    from engine.models import load_model, size_of
    from export.benchmark import Candidate
    from export.engines.graph import weight_bytes
    from export.engines.ort import OrtEngine
    from export.engines.parity import check_parity, evaluate_engine
    from export.serving.bundle import write_bundle

    started = time.monotonic()
    rows, data = prepare_for_model(config, stage.recipe, path)
    task = data.task
    judged = "test" if "test" in data.examples else "validation"
    examples = data.examples[judged]
    source = find_source(stage, path, task.inputs)
    stage.begin()
    work = stage.partial / "engines"
    work.mkdir(exist_ok=True)
    engines = build_engines(config, source, np.asarray([len(e["input_ids"]) for e in data.examples["train"]]), work)
    engine = OrtEngine(engines["onnxruntime"], config.threads, wide=source.weights == "8bit")
    reference = load_model(source.reference, "classification", attention="eager")
    _, reference_NC = evaluate_classifier(reference, task, examples)
    parity = check_parity(engine, task, examples, reference_NC, config.gates)
    metrics = data.judge(lambda examples: evaluate_engine(engine, task, examples), stage.output)

    inputs = [{name: task.collate([example])[name].numpy() for name in task.inputs} for example in examples[:LATENCY_INPUTS]]
    candidate = Candidate(f"{stage.name}/engine", stage.name, "onnxruntime", source.precision, engine.run)
    benchmark, comparison = run_benchmark(stage, candidates_of(stage, path, candidate, task.inputs), inputs)
    size = weight_bytes(source.graph)
    if config.baseline is not None:
        baseline = Path(stage.recipe.find_model(config.baseline))
        _, logits_NC = evaluate_engine(engine, task, examples)
        comparison |= compare(config, baseline, task, examples, logits_NC, size)
    write_bundle(
        stage.output,
        name=stage.recipe.name,
        task=config.task,
        labels=task.labels,
        max_length=config.max_length,
        max_batch=config.max_batch,
        tokenizer=Path(path),
        engines=engines,
        weights=source.weights,
        golden=golden_rows(config.task, rows[judged], examples, reference_NC),
        parity=parity,
        benchmark=benchmark,
        provenance={"recipe": stage.recipe.name, "stage": stage.name, "seed": stage.seed, "inputs": stage.inputs},
    )
    stage.complete(
        metrics=metrics,
        parameters=size_of(reference)["parameters"],
        weight_bytes=size,
        parity=parity,
        benchmark=benchmark,
        comparison=comparison,
        seconds={"this_run": round(time.monotonic() - started, 3)},
    )


def main() -> None:
    """Entry point of `python -m export.export RECIPE --stage NAME`."""
    stage_main("export.export", ExportConfig, run)


if __name__ == "__main__":
    main()
