"""Triton's model repository: two models of one bundle.

`<name>_core` takes tokens and gives logits. `<name>` takes texts and gives labels and scores: it carries the dynamic batching,
because a batcher of token inputs merges only requests of equal length. `export.serving.server` reads the same config.pbtxt.
A TensorRT-RTX engine is no TensorRT plan and never goes into a repository.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from engine.errors import UserError

VERSION = "1"
MAX_QUEUE = 256
"""Requests that wait; one more is refused at once, so that a client hears of an overload early."""

_CORE = """\
name: "{core}"
platform: "{platform}"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
  {{ name: "logits" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }}
]
instance_group [ {{ kind: KIND_AUTO }} ]
"""

_TEXT = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [
{inputs}
]
output [
  {{ name: "LABEL" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "SCORES" data_type: TYPE_FP32 dims: [ {classes} ] label_filename: "labels.txt" }}
]
instance_group [ {{ kind: KIND_CPU }} ]
dynamic_batching {{
  default_queue_policy {{ max_queue_size: {max_queue} }}
}}
parameters {{ key: "core" value: {{ string_value: "{core}" }} }}
parameters {{ key: "core_inputs" value: {{ string_value: "{core_inputs}" }} }}
"""


def core_name(name: str) -> str:
    """Name of the token model of a bundle."""
    return f"{name}_core"


def _tensors(names: list[str], data_type: str, size: int) -> str:
    return ",\n".join(f'  {{ name: "{name}" data_type: {data_type} dims: [ {size} ] }}' for name in names)


def write_repository(
    models: Path,
    *,
    name: str,
    labels: list[str],
    inputs: list[str],
    text_pair: bool,
    max_batch: int,
    tokenizer: Path,
    onnx: Path,
    plan: Path | None = None,
) -> dict[str, str]:
    """Writes a model repository.

    Args:
        models: directory of the repository; it is made.
        inputs: names of the ONNX graph's inputs.
        text_pair: the text model takes TEXT_PAIR beside TEXT.
        tokenizer: tokenizer.json with truncation and padding set.
        plan: a TensorRT plan; Triton then runs it instead of the ONNX file, which stays beside it for other runtimes.

    Returns:
        {runtime: path of its engine below `models`}.

    Raises:
        UserError: a label with a line break, which labels.txt cannot hold; an input whose name is no identifier.
    """
    for label in labels:
        if label.splitlines() != [label]:
            raise UserError(f"label {label!r} is empty or holds a line break: rename it under task.names")
    for item in inputs:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", item):
            raise UserError(f"{onnx}: the input name {item!r} is no identifier: rename it in the ONNX graph")
    core = core_name(name)
    values = {
        "name": name,
        "core": core,
        "core_inputs": " ".join(inputs),
        "max_batch": max_batch,
        "max_queue": MAX_QUEUE,
        "classes": len(labels),
        "platform": "tensorrt_plan" if plan else "onnxruntime_onnx",
    }
    texts = ["TEXT", "TEXT_PAIR"] if text_pair else ["TEXT"]
    configs = {
        core: _CORE.format(inputs=_tensors(inputs, "TYPE_INT64", -1), **values),
        name: _TEXT.format(inputs=_tensors(texts, "TYPE_STRING", 1), **values),
    }
    for model, config in configs.items():
        (models / model / VERSION).mkdir(parents=True)
        (models / model / "config.pbtxt").write_text(config, encoding="utf-8")
        (models / model / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("text_model.py"), models / name / VERSION / "model.py")
    shutil.copyfile(tokenizer, models / name / VERSION / "tokenizer.json")
    engines = {"onnxruntime": (onnx, f"{core}/{VERSION}/model.onnx")}
    if plan:
        engines["tensorrt"] = (plan, f"{core}/{VERSION}/model.plan")
    for source, target in engines.values():
        shutil.copyfile(source, models / target)
    return {runtime: target for runtime, (_, target) in engines.items()}
