"""Triton's model repository: the models of one bundle.

`<name>_core` takes the inputs of the bundle's graph and gives its outputs (`<name>_<graph>` for every further graph). `<name>`
takes texts and gives answers, by the answering half that lies beside it: it carries the dynamic batching, because a batcher of
token inputs merges only requests of equal length. `export.serving.server` reads the same config.pbtxt.
A TensorRT-RTX engine is no TensorRT plan and never goes into a repository.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import engine
import engine.answers
from engine.answers import MODEL, Answers
from engine.errors import UserError
from export.engines import Weights

VERSION = "1"
MAX_QUEUE = 256
"""Requests that wait; one more is refused at once, so that a client hears of an overload early."""
TASK_FILE = "task.json"
"""Beside the text model: the task, what it has to know, and the models that run its graphs."""
LABELS_FILE = "labels.txt"
TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "STRING": "TYPE_STRING", "FP32": "TYPE_FP32"}

_CORE = """\
name: "{model}"
platform: "{platform}"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ kind: {kind} }} ]
"""

_TEXT = """\
name: "{model}"
backend: "python"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ kind: KIND_CPU }} ]
dynamic_batching {{
  default_queue_policy {{ max_queue_size: {max_queue} }}
}}
"""


def core_name(name: str, graph: str = MODEL) -> str:
    """Name of the model that runs a graph of a bundle."""
    return f"{name}_core" if graph == MODEL else f"{name}_{graph}"


def input_names(answers: Answers) -> dict[str, str]:
    """Returns {name of an input of the text model: name of the task's input}."""
    return {name.upper(): name for name in answers.columns}


def _tensors(tensors: list[tuple[str, str, list[int], bool]]) -> str:
    """Writes (name, type, dims without the batch, whether its elements have labels)."""
    lines = []
    for name, kind, dims, labelled in tensors:
        labels = f' label_filename: "{LABELS_FILE}"' if labelled else ""
        sizes = ", ".join(map(str, dims))
        lines.append(f'  {{ name: "{name}" data_type: {TYPES[kind]} dims: [ {sizes} ]{labels} }}')
    return ",\n".join(lines)


def _of_graph(entries: list[dict[str, Any]], classes: int = 0) -> str:
    """Writes the tensors of a graph; an output with one number for each of the `classes` labels names them."""
    tensors = []
    for entry in entries:
        dims = [size if isinstance(size, int) else -1 for size in entry["shape"][1:]]
        tensors.append((entry["name"], entry["dtype"], dims, bool(classes) and dims == [classes]))
    return _tensors(tensors)


def write_repository(
    models: Path,
    *,
    name: str,
    task: str,
    answers: Answers,
    graphs: dict[str, dict[str, list[dict[str, Any]]]],
    max_batch: int,
    tokenizer: Path,
    engines: dict[str, dict[str, Path]],
    weights: Weights | None = None,
) -> dict[str, dict[str, str]]:
    """Writes a model repository.

    Args:
        models: directory of the repository; it is made.
        task: name of the answering half.
        answers: that half.
        graphs: {graph: its "inputs" and "outputs", as the manifest has them}.
        tokenizer: tokenizer.json with truncation and padding set.
        engines: {graph: {runtime: file}}. Triton runs a TensorRT plan instead of the ONNX file, which stays beside it for other
            runtimes.
        weights: form of int8 weights; None: the ONNX files compute with floats. int8 products of ONNX Runtime are made for CPUs,
            and that is where Triton runs them, on machines with GPUs too.

    Returns:
        {graph: {runtime: path of its engine below `models`}}.

    Raises:
        UserError: a label with a line break, which labels.txt cannot hold; an input whose name is no identifier.
    """
    _check_names(answers.labels, graphs, engines)
    found: dict[str, dict[str, str]] = {}
    common: dict[str, Any] = {"max_batch": max_batch, "max_queue": MAX_QUEUE}
    for graph, sides in graphs.items():
        core, files = core_name(name, graph), engines[graph]
        platform = "tensorrt_plan" if "tensorrt" in files else "onnxruntime_onnx"
        kind = "KIND_CPU" if weights is not None and "tensorrt" not in files else "KIND_AUTO"
        tensors = {"inputs": _of_graph(sides["inputs"]), "outputs": _of_graph(sides["outputs"], len(answers.labels))}
        _write_model(models / core, _CORE.format(model=core, platform=platform, kind=kind, **tensors, **common), answers.labels)
        found[graph] = {"onnxruntime": f"{core}/{VERSION}/model.onnx"}
        if "tensorrt" in files:
            found[graph]["tensorrt"] = f"{core}/{VERSION}/model.plan"
        for runtime, target in found[graph].items():
            shutil.copyfile(files[runtime], models / target)
    tensors = {
        "inputs": _tensors([(item, "STRING", [1], False) for item in input_names(answers)]),
        "outputs": _tensors([(item.name, item.datatype, [item.size], item.labelled) for item in answers.served]),
    }
    _write_model(models / name, _TEXT.format(model=name, **tensors, **common), answers.labels)
    directory = models / name / VERSION
    shutil.copyfile(Path(__file__).with_name("text_model.py"), directory / "model.py")
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    copy_answers(task, answers, directory)
    cores = {
        graph: {"model": core_name(name, graph), **{side: [item["name"] for item in items] for side, items in sides.items()}}
        for graph, sides in graphs.items()
    }
    about = {"task": task, "facts": answers.facts, "max_batch": max_batch, "graphs": cores}
    (directory / TASK_FILE).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _check_names(
    labels: list[str], graphs: dict[str, dict[str, list[dict[str, Any]]]], engines: dict[str, dict[str, Path]]
) -> None:
    for label in labels:
        if label.splitlines() != [label]:
            raise UserError(f"label {label!r} is empty or holds a line break: rename it under task.names")
    for graph, sides in graphs.items():
        for item in [*sides["inputs"], *sides["outputs"]]:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", item["name"]):
                where = engines[graph]["onnxruntime"]
                raise UserError(f"{where}: the name {item['name']!r} is no identifier: rename it in the ONNX graph")
            if len(item["shape"]) < 2:
                where = engines[graph]["onnxruntime"]
                raise UserError(f"{where}: '{item['name']}' has only the axis of the batch: a tensor of a bundle has another one")
            if item["dtype"] not in TYPES:
                where = engines[graph]["onnxruntime"]
                raise UserError(f"{where}: '{item['name']}' is a {item['dtype']}: a bundle holds int64 and float32 tensors")


def _write_model(directory: Path, config: str, labels: list[str]) -> None:
    (directory / VERSION).mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config, encoding="utf-8")
    if labels:
        (directory / LABELS_FILE).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")


def copy_answers(task: str, answers: Answers, directory: Path) -> None:
    """Copies `engine.answers` as it is; the answering half of an installed package is put among its files, by the task's name."""
    package = Path(str(engine.__file__)).parent
    target = directory / "engine" / "answers"
    target.mkdir(parents=True)
    shutil.copyfile(package / "__init__.py", target.parent / "__init__.py")
    for source in sorted((package / "answers").glob("*.py")):
        shutil.copyfile(source, target / source.name)
    if task not in engine.answers.own():
        shutil.copyfile(inspect.getfile(type(answers)), target / f"{task}.py")
