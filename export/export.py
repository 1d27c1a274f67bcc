"""The export stage: a model becomes ONNX, engines, a benchmark and a bundle that checks itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.config import ModelRef, Strict
from engine.cpu import instructions
from engine.data.readers import Row
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.stages.stage import Stage, lineage, read_stage, stage_main
from engine.tasks import AnyTask
from export.engines import Weights
from export.engines.parity import ParityGates

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from engine.answers import Answer, Answers, Run
    from engine.tasks import Task
    from export.engines.benchmark import Calls, Candidate
    from export.engines.parity import Outputs

Backend = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
GOLDEN = 32
"""Golden inputs of a bundle."""
LATENCY_INPUTS = 200
"""Test rows of the latency benchmark."""


class ExportConfig(Strict):
    """Section of an `export` stage."""

    model: ModelRef
    """What to serve: a `quantize` stage (int8) or any stage or model directory (fp32)."""
    task: AnyTask
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

    graphs: dict[str, onnx.ModelProto]
    precision: str
    reference: Path | str
    """The float model that the graphs were made from."""
    weights: Weights | None = None
    """Form of int8 weights."""


def find_source(stage: Stage[ExportConfig], path: Path | str, task: Task) -> Source:
    """Returns the int8 graphs of a `quantize` stage, or the graphs of a float model."""
    import onnx

    from engine.models.fitting import load_finished
    from export.compress.quantize import graph_file
    from export.engines.graph import export_graphs, merge_projections

    record = read_stage(path) if isinstance(path, Path) else None
    # A model.onnx of somebody else may lie beside weights: only our own record says that it is their int8 graph.
    if isinstance(path, Path) and record is not None and record["kind"] == "quantize":
        before = record["inputs"]["model"]["reference"]
        beside = path.parent / before
        reference = beside if beside.is_dir() else stage.recipe.find_model(before)
        graphs = {name: onnx.load(path / graph_file(name)) for name in task.graphs}
        return Source(graphs, "int8", reference, record["section"].get("weights", "8bit"))
    graphs = export_graphs(load_finished(path, task, "eager"), task)
    for graph in graphs.values():
        merge_projections(graph)
    return Source(graphs, "fp32", path)


def build_engines(config: ExportConfig, source: Source, lengths: np.ndarray, directory: Path) -> dict[str, dict[str, Path]]:
    """Writes the ONNX files and compiles the other backends from them; returns {graph: {backend: file}}.

    Raises:
        UserError: a backend's package is missing or refuses the model.
        RuntimeError: a matrix product of the network is not quantized as the graph says.
    """
    import onnx

    from engine.models import positions_of, read_config
    from export.compress.quantize import tensorrt_form
    from export.engines.trt import Profile, build_engine, parse_network, quantized_matmuls, tensorrt_module

    profile = Profile.of_lengths(lengths, config.max_batch, config.max_length)
    positions = positions_of(read_config(source.reference).to_dict())
    engines: dict[str, dict[str, Path]] = {}
    for graph, model in source.graphs.items():
        files = engines[graph] = {"onnxruntime": directory / f"{graph}.onnx"}
        onnx.save(model, files["onnxruntime"])
        for backend in dict.fromkeys(config.backends):
            if backend == "onnxruntime":
                continue
            trt = tensorrt_module(backend)
            parsed = parse_network(trt, tensorrt_form(model).SerializeToString())
            quantized, half = quantized_matmuls(trt, parsed.network)
            if half or bool(quantized) != (source.precision == "int8"):
                raise RuntimeError(f"{backend}: matrix products with two int8 inputs: {quantized}; with only one: {half}")
            files[backend] = directory / f"{graph}.{backend}.engine"
            files[backend].write_bytes(build_engine(trt, parsed, profile, positions))
            said = f"{len(quantized)} int8 matrix products, shapes (batch, length) {profile.shapes()}"
            print(f"  {backend}: graph {graph}: {said}", flush=True)
    return engines


def gate_others(
    config: ExportConfig,
    engines: dict[str, dict[str, Path]],
    answers: Answers,
    rows: Sequence[Row],
    reference: tuple[list[Answer], Outputs],
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Holds the engines beside the embedded one to the same gates, where this machine can run them.

    Returns:
        ({backend: what `check_parity` found, or {"not_run": why}}, {backend: `run` of those that do}).

    Raises:
        UserError: a gate is not passed.
    """
    from engine.answers._batches import batched
    from export.engines.parity import check_parity, run_of
    from export.engines.trt import TrtEngine, why_not_run

    found: dict[str, Any] = {}
    runs: dict[str, Run] = {}
    for backend in dict.fromkeys(name for name in config.backends if name != "onnxruntime"):
        if reason := why_not_run(backend):
            print(f"  {backend}: {reason}: its answers, outputs and times were not looked at", flush=True)
            found[backend] = {"not_run": reason}
            continue
        loaded = {name: TrtEngine(files[backend], backend) for name, files in engines.items()}
        runs[backend] = batched(run_of(loaded), config.max_batch)
        try:
            found[backend] = check_parity(runs[backend], answers, rows, reference, config.gates, config.max_length)
        except UserError as error:
            raise UserError(f"{backend}: {error}") from None
    return found, runs


def candidates_of(
    stage: Stage[ExportConfig], path: Path | str, engine: Candidate, task: Task, rows: Sequence[Row]
) -> list[Candidate]:
    """Returns the engine, the baseline in PyTorch and ONNX Runtime, and the float stages on the way in ONNX Runtime.

    A model with another tokenizer than the engine reads the same rows with its own.
    """
    from engine.models.fitting import load_finished
    from engine.tasks import with_tokenizer_of
    from export.engines.benchmark import Candidate, calls_of, replay, torch_candidate
    from export.engines.graph import export_graphs
    from export.engines.ort import OrtEngine
    from export.engines.parity import run_of

    config = stage.config
    records = lineage(path) if isinstance(path, Path) else {}
    directories = {r["stage"]: d for d, r in records.items() if r["kind"] in ("finetune", "distill", "prune", "factorize")}
    if config.baseline is not None:
        directories = {str(config.baseline): Path(stage.recipe.find_model(config.baseline)), **directories}
    found = [engine]
    for name, directory in directories.items():
        own = with_tokenizer_of(task, directory)
        graphs = export_graphs(load_finished(directory, own, "eager"), own)
        run = run_of({graph: OrtEngine(model.SerializeToString(), config.threads) for graph, model in graphs.items()})
        inputs = None if own is task else [calls_of(own.answers, run, row) for row in rows]
        if name == config.baseline:
            found.insert(1, torch_candidate(name, directory, own, config.threads, inputs))
        found.append(Candidate(f"{name}/onnx-fp32", name, "onnxruntime", "fp32", replay(run), inputs))
    return found


def run_benchmark(
    stage: Stage[ExportConfig], candidates: list[Candidate], inputs: list[Calls]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures all candidates side by side.

    Returns:
        (the `benchmark` record, {"speedup_vs_torch_fp32", "speedup_vs_onnx_fp32"} of the engine over the baseline).
    """
    from engine.intervals import ratio_interval
    from export.engines.benchmark import measure, summary

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
    config: ExportConfig, baseline: Path, task: Task, rows: Sequence[Row], answers: list[Answer], size: int
) -> dict[str, Any]:
    """Returns what the engine loses and saves against the baseline: the metric, with its paired interval where it has one.

    Args:
        answers: of the engine to `rows`.
        size: bytes of the engine's weights.
    """
    from engine.evaluate import evaluate
    from engine.intervals import paired_bootstrap_drop
    from engine.models import size_of
    from engine.models.fitting import load_finished
    from engine.tasks import task_of_model

    judge, metric = task.answers, task.answers.metric
    own = task_of_model(config.task, baseline, config.max_length)  # it may read otherwise, and order its classes otherwise
    model = load_finished(baseline, own)
    metrics, before = evaluate(model, own, rows)
    if metric.counted:
        drop: dict[str, float] = paired_bootstrap_drop(judge.right(before, rows), judge.right(answers, rows))._asdict()
    else:
        lost = metrics[metric.name] - judge.metrics(answers, rows)[metric.name]
        drop = {"value": lost if metric.higher_is_better else -lost}
    return {
        "baseline": config.baseline,
        f"{metric.name}_drop_points": {**drop, "n": len(rows)},
        "weight_bytes_ratio": size / size_of(model)["weight_bytes"],
    }


def golden_rows(answers: Answers, rows: Sequence[Row]) -> list[Row]:
    """Returns GOLDEN rows spread evenly over the lengths, shortest and longest included: the inputs alone."""
    import numpy as np

    inputs = [answers.inputs(row) for row in rows]
    order = np.argsort([sum(map(len, row.values())) for row in inputs], kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(GOLDEN, len(order))).astype(int)]
    return [inputs[row] for row in chosen]


def run(stage: Stage[ExportConfig]) -> None:
    """Runs one export stage."""
    config = stage.config
    path = stage.recipe.find_model(config.model)
    stage.inputs  # noqa: B018 - missing inputs show before anything heavy is loaded
    import numpy as np

    from engine.data.rows import prepare_for_model
    from engine.evaluate import evaluating, torch_run
    from engine.models import size_of
    from engine.models.fitting import load_finished
    from export.engines.benchmark import Candidate, calls_of, replay
    from export.engines.graph import weight_bytes
    from export.engines.ort import OrtEngine
    from export.engines.parity import check_parity, evaluate_engine, observe, run_of
    from export.serving.write import write_bundle

    started = time.monotonic()
    data = prepare_for_model(config, stage.recipe, path)
    task, answers = data.task, data.task.answers
    judged = "test" if "test" in data.rows else "validation"
    rows = data.rows[judged]
    source = find_source(stage, path, task)
    stage.begin()
    work = stage.partial / "engines"
    work.mkdir(exist_ok=True)
    engines = build_engines(config, source, np.asarray([len(e["input_ids"]) for e in data.examples["train"]]), work)
    wide = source.weights == "8bit"
    engine = run_of({name: OrtEngine(files["onnxruntime"], config.threads, wide=wide) for name, files in engines.items()})
    reference = load_finished(source.reference, task, "eager")
    with evaluating(reference):
        observed = observe(torch_run(reference, task), answers, rows)
    parity = check_parity(engine, answers, rows, observed, config.gates, config.max_length)
    others, runs = gate_others(config, engines, answers, rows, observed)
    parity["others"] = others
    metrics = data.judge(lambda rows: evaluate_engine(engine, answers, rows), stage.output)

    inputs = [calls_of(answers, engine, row) for row in rows[:LATENCY_INPUTS]]
    candidate = Candidate(f"{stage.name}/engine", stage.name, "onnxruntime", source.precision, replay(engine))
    candidates = candidates_of(stage, path, candidate, task, rows[:LATENCY_INPUTS])
    for backend, other in runs.items():
        candidates.append(Candidate(f"{stage.name}/{backend}", stage.name, backend, source.precision, replay(other)))
    benchmark, comparison = run_benchmark(stage, candidates, inputs)
    size = sum(weight_bytes(graph) for graph in source.graphs.values())
    if config.baseline is not None:
        baseline = Path(stage.recipe.find_model(config.baseline))
        comparison |= compare(config, baseline, task, rows, evaluate_engine(engine, answers, rows)[1], size)
    tokenizer = stage.partial / "tokenizer"
    task.tokenizer.save_pretrained(tokenizer)  # a model may come without tokenizer.json, which a bundle needs
    golden = golden_rows(answers, rows)
    write_bundle(
        stage.output,
        name=stage.recipe.name,
        task=config.task.type,
        facts=answers.facts,
        max_length=config.max_length,
        max_batch=config.max_batch,
        tokenizer=tokenizer,
        engines=engines,
        weights=source.weights,
        golden=golden,
        reference=torch_run(reference.eval(), task),
        parity=parity,
        benchmark=benchmark,
        provenance={"recipe": stage.recipe.name, "stage": stage.name, "seed": stage.seed, "inputs": stage.inputs},
    )
    stage.complete(
        metric=answers.metric._asdict(),
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
