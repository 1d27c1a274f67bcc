"""The whole way of a task, from rows to a bundle, in this process, and what holds for the bundle of every task."""

import pytest

from engine.answers._batches import answer_all
from engine.config import load_recipe
from engine.data.rows import prepare_for_model
from engine.evaluate import evaluating, torch_run
from engine.models import load_model
from engine.stages.stage import Stage
from export.export import ExportConfig
from export.serving.bundle import Bundle
from launch.check import check_recipe
from launch.recipe import load_stages
from tests.recipes import run_here, write_recipe


def whole_way(task, data, max_length, train, short, **student):
    """The stages: task, data and length are said once. `student`: keys of its distillation."""
    return {
        "teacher": {"finetune": {"model": "model", "task": task, "data": data, "max_length": max_length, "train": train}},
        "student": {"distill": {"teacher": "teacher", "student": {"layers": 1}, "train": short, **student}},
        "slim": {"prune": {"model": "student", "heads": 2, "neurons": 32}},
        "recovered": {"distill": {"teacher": "teacher", "student": {"model": "slim"}, "train": short}},
        "int8": {"quantize": {"model": "recovered"}},
        "engine": {"export": {"model": "int8", "baseline": "teacher", "threads": 1, "rounds": 5, "max_batch": 8}},
    }


def run_stages(directory, stages):
    """(recipe, run directory) after the recipe was checked and every stage has run; the rows lie in `directory`."""
    recipe = write_recipe(directory, stages)
    loaded = load_recipe(recipe)
    check_recipe(loaded, load_stages(loaded))
    for name in stages:
        run_here(recipe, name, directory / "runs")
    return recipe, directory / "runs" / "tiny"


def prepared(recipe, run, stage):
    """The rows of the chain as a stage's model does the task."""
    loaded = load_recipe(recipe, [], run.parent)
    return prepare_for_model(Stage(loaded, "engine", ExportConfig).config, loaded, run / stage)


def answers_like_pytorch(recipe, run):
    """(test rows, the bundle, its answers to them), which are those of the model that it was made of; some rows make windows."""
    data, bundle = prepared(recipe, run, "recovered"), Bundle.open(run / "engine")
    rows = data.rows["test"]
    assert data.task.windows > 0
    model = load_model(run / "recovered", data.task.head)
    with evaluating(model):
        expected = answer_all(data.task.answers, torch_run(model, data.task), rows, 16)
    given = bundle.predict(list(rows))
    assert data.task.answers.agreement(given, expected) >= 0.9
    return rows, bundle, given


def tensorrt_builds(run, max_length):
    """Builds the graph of the bundle: both inputs of every quantized MatMul come from int8."""
    pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
    import onnx

    from export.compress.quantize import tensorrt_form
    from export.engines.trt import Profile, build_engine, parse_network, quantized_matmuls, tensorrt_module

    trt = tensorrt_module("tensorrt_rtx")
    graph = tensorrt_form(onnx.load(run / "engine" / "models" / "tiny_core" / "1" / "model.onnx"))
    parsed = parse_network(trt, graph.SerializeToString())
    both, one = quantized_matmuls(trt, parsed.network)
    assert both and not one
    assert len(build_engine(trt, parsed, Profile(4, 8, 12, max_length))) > 10_000
