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
from transformers.pytorch_utils import Conv1D

from engine.answers._batches import MASK
from engine.errors import UserError
from engine.models.families import family_of
from engine.tasks import Graph, Task
from export.engines.einsum import einsums_to_products

OPSET = 20
"""Opset 23 has an Attention operator that TensorRT-RTX parses but cannot build."""


class _Traced(torch.nn.Module):
    """A graph as it is wanted: 0/1 mask in, named tensors out; where the family takes one, an additive mask of three nodes."""

    def __init__(self, model: Any, graph: Graph) -> None:
        super().__init__()
        self.model = model
        self.graph = graph
        self.additive = family_of(model.config.model_type).additive_mask

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.graph.inputs, tensors, strict=True))
        mask_BL = named.get(MASK)
        if mask_BL is not None and self.additive:
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

    Raises:
        UserError: the architecture does something that the tracer does not know.
    """
    from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

    shape = NormalizedTextConfig(model.config)
    generator = DummyTextInputGenerator("text-classification", shape, batch_size=2, sequence_length=16)
    dummies = tuple(generator.generate(name, framework="pt") for name in graph.inputs)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    training, caching = model.training, getattr(model.config, "use_cache", False)
    model.eval()
    _linear_only(model)
    with warnings.catch_warnings(), _quiet("torch.onnx"), _quiet("onnxscript"), torch.no_grad():
        warnings.simplefilter("ignore")
        if caching:
            model.config.use_cache = False  # nothing comes after the one pass
        try:
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
        except torch.onnx.OnnxExporterError as error:
            raise UserError(f"models of type '{model.config.model_type}' cannot be traced to ONNX: {_cause(error)}") from None
    model.train(training)
    if caching:
        model.config.use_cache = caching
    assert program is not None
    proto = program.model_proto
    _forget_origin(proto)
    _finite_masks(proto)
    if einsums_to_products(proto):
        drop_unused(proto)
    onnx.checker.check_model(proto)
    return proto


def _cause(error: BaseException) -> str:
    """Returns the first two lines of what began an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split("\n")[:2]) or type(error).__name__


def _linear_only(model: Any) -> None:
    """Puts a Linear in the place of every Conv1D, in place: the same weights, one MatMul for any number of rows."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, Conv1D):
                linear = torch.nn.Linear(part.nx, part.nf, device="meta")
                linear.weight, linear.bias = torch.nn.Parameter(part.weight.detach().T), part.bias
                setattr(module, name, linear)


def _finite_masks(model: onnx.ModelProto) -> None:
    """Halves the lowest numbers that hide tokens, in place: a score that is added to them must not make them infinite.

    A row of nothing but infinities has no softmax, and padding may see nothing at all.
    """
    lowest = np.finfo(np.float32).min
    places = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.name == "value")]
    for tensor in places:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if (values <= lowest).any():
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.maximum(values, lowest / 2)), tensor.name))


def _forget_origin(model: onnx.ModelProto) -> None:
    """Removes what the tracer notes down about its sources: stack traces with the paths of this machine."""
    graph = model.graph
    for part in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


class _quiet:  # noqa: N801 - reads as a statement
    """Silences a logger for a while: the tracer reports what is not installed, its optimizer what stays as it is."""

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
    """Returns (node, weight of shape (in, out)) of every MatMul of something computed with a constant matrix on its right."""
    constants = {name: tensor for name, tensor in initializers(model).items() if len(tensor.dims) == 2}
    found = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in constants and n.input[0] not in constants]
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
    groups: dict[tuple[str, bool], list[tuple[onnx.NodeProto, onnx.NodeProto | None]]] = {}
    for node, _ in weight_matmuls(model):
        after = readers.get(node.output[0], [])
        add = after[0] if len(after) == 1 and after[0].op_type == "Add" and after[0].input[1] in constants else None
        groups.setdefault((node.input[0], add is not None), []).append((node, add))
    merged = 0
    for (source, _), layers in groups.items():
        if len(layers) < 2:
            continue
        weights = [constants[node.input[1]] for node, _ in layers]
        biases = [constants[add.input[1]] for _, add in layers if add is not None]
        # Named after what they are made of: layers that share their weights share what is merged of them, too.
        name, weight = f"{layers[0][0].name}_merged", f"{'_'.join(tensor.name for tensor in weights)}_merged"
        values = {
            weight: np.concatenate([numpy_helper.to_array(tensor) for tensor in weights], axis=1),
            f"{weight}_sizes": np.asarray([tensor.dims[1] for tensor in weights], dtype=np.int64),
            **({f"{weight}_bias": np.concatenate([numpy_helper.to_array(tensor) for tensor in biases])} if biases else {}),
        }
        there = initializers(model)
        graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in values.items() if key not in there)
        outputs = [(add or node).output[0] for node, add in layers]
        last = f"{name}_product" if biases else name
        new = [onnx.helper.make_node("MatMul", [source, weight], [last], name=f"{name}_matmul")]
        if biases:
            new.append(onnx.helper.make_node("Add", [last, f"{weight}_bias"], [name], name=f"{name}_add"))
        new.append(onnx.helper.make_node("Split", [name, f"{weight}_sizes"], outputs, name=f"{name}_split", axis=-1))
        replace_node(model, layers[0][0], new)
        for node, add in layers:
            if node is not layers[0][0]:
                graph.node.remove(node)
            if add is not None:
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
