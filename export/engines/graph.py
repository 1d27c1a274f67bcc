"""Model → ONNX with dynamic batch and sequence, and the rewrites that all engines profit from.

Shapes: B rows, L tokens.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from engine.answers._batches import MASK
from engine.tasks import Graph, Task

OPSET = 20
"""Opset 23 has an Attention operator that TensorRT-RTX parses but cannot build."""


class _Traced(torch.nn.Module):
    """A graph as it is wanted: 0/1 mask in, named tensors out, the additive mask computed by three nodes."""

    def __init__(self, model: Any, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.graph = graph

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.graph.inputs, tensors, strict=True))
        mask_BL = named.get(MASK)
        if mask_BL is not None:
            lowest = torch.finfo(torch.float32).min
            named[MASK] = (1.0 - mask_BL[:, None, None, :].to(torch.float32)) * lowest
        outputs = self.graph.run(self.model, named, mask_BL)
        return tuple(outputs[name] for name in self.graph.outputs)


def export_graphs(model: Any, task: Task) -> dict[str, onnx.ModelProto]:
    """Returns every graph of a task by name; see `export_onnx`."""
    return {name: export_onnx(model, graph) for name, graph in task.graphs.items()}


def export_onnx(model: Any, graph: Graph) -> onnx.ModelProto:
    """Traces one graph with dynamic batch and sequence.

    Args:
        model: of transformers, loaded with attention "eager": fused attention adds nodes that engines do not know.
        graph: what of it is traced; its inputs are among input_ids, attention_mask and token_type_ids.

    Returns:
        an ONNX model with the inputs and outputs of the graph.
    """
    from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

    shape = NormalizedTextConfig(model.config)
    generator = DummyTextInputGenerator("text-classification", shape, batch_size=2, sequence_length=16)
    dummies = tuple(generator.generate(name, framework="pt") for name in graph.inputs)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    training = model.training
    model.eval()
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Traced(model, graph).eval(),
            dummies,
            dynamo=True,
            opset_version=OPSET,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=((axes,) * len(graph.inputs),),
            verbose=False,
        )
    model.train(training)
    assert program is not None
    proto = program.model_proto
    _forget_origin(proto)
    onnx.checker.check_model(proto)
    return proto


def _forget_origin(model: onnx.ModelProto) -> None:
    """Removes what the tracer notes down about its sources: stack traces with the paths of this machine."""
    graph = model.graph
    for part in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


class _quiet:  # noqa: N801 - reads as a statement
    """Silences a logger for a while: the tracer reports operators of packages that are not installed."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Returns {name: tensor} of the model's constants."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def weight_matmuls(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, np.ndarray]]:
    """Returns (node, weight of shape (in, out)) of every MatMul with a constant matrix on its right."""
    constants = initializers(model)
    found = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants]
    return [(node, numpy_helper.to_array(constants[node.input[1]])) for node in found]


def merge_projections(model: onnx.ModelProto) -> int:
    """Merges linear layers that read the same tensor (query, key and value) into one, split afterwards; in place.

    One matrix product of three times the width costs less than three, and is quantized once.

    Returns:
        how many groups were merged.
    """
    graph = model.graph
    constants = initializers(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    groups: dict[str, list[tuple[onnx.NodeProto, onnx.NodeProto]]] = {}
    for node, weight in weight_matmuls(model):
        after = readers.get(node.output[0], [])
        if weight.ndim == 2 and len(after) == 1 and after[0].op_type == "Add" and after[0].input[1] in constants:
            groups.setdefault(node.input[0], []).append((node, after[0]))
    merged = 0
    for source, layers in groups.items():
        if len(layers) < 2:
            continue
        weights = [numpy_helper.to_array(constants[node.input[1]]) for node, _ in layers]
        biases = [numpy_helper.to_array(constants[add.input[1]]) for _, add in layers]
        name = f"{source}_merged"
        sizes = np.asarray([weight.shape[1] for weight in weights], dtype=np.int64)
        graph.initializer.extend(
            [
                numpy_helper.from_array(np.concatenate(weights, axis=1), f"{name}_weight"),
                numpy_helper.from_array(np.concatenate(biases), f"{name}_bias"),
                numpy_helper.from_array(sizes, f"{name}_sizes"),
            ]
        )
        new = [
            onnx.helper.make_node("MatMul", [source, f"{name}_weight"], [f"{name}_product"], name=f"{name}_matmul"),
            onnx.helper.make_node("Add", [f"{name}_product", f"{name}_bias"], [name], name=f"{name}_add"),
            onnx.helper.make_node(
                "Split", [name, f"{name}_sizes"], [add.output[0] for _, add in layers], name=f"{name}_split", axis=-1
            ),
        ]
        replace_node(model, layers[0][0], new)
        for node, add in layers:
            if node is not layers[0][0]:
                graph.node.remove(node)
            graph.node.remove(add)
        merged += 1
    drop_unused(model)
    return merged


def replace_node(model: onnx.ModelProto, node: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    """Puts nodes in the place of one, in place; constants that only it read go with it."""
    place = list(model.graph.node).index(node)
    model.graph.node.remove(node)
    for offset, item in enumerate(new):
        model.graph.node.insert(place + offset, item)
    drop_unused(model)


def drop_unused(model: onnx.ModelProto) -> None:
    """Removes constants that no node reads, in place."""
    used = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def weight_bytes(model: onnx.ModelProto | Path) -> int:
    """Returns the bytes of all constants of an ONNX model."""
    proto = onnx.load(model) if isinstance(model, Path) else model
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in proto.graph.initializer)
