"""Linear maps that a model writes as Einsum become MatMul, which engines are fast at and int8 is made of."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper


def einsums_to_products(model: onnx.ModelProto) -> int:
    """Turns every Einsum of a tensor with a constant that is a linear map of its last axes into a MatMul, in place.

    Returns:
        how many.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for node in list(model.graph.node):
        if node.op_type != "Einsum" or len(node.input) != 2 or node.input[1] not in constants:
            continue
        axes = linear_map(next(a.s.decode() for a in node.attribute if a.name == "equation"))
        if axes is None:
            continue
        place = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for offset, item in enumerate(_product(model, node, numpy_helper.to_array(constants[node.input[1]]), *axes)):
            model.graph.node.insert(place + offset, item)
        changed += 1
    return changed


def linear_map(equation: str) -> tuple[int, str, str, str] | None:
    """Returns (axes of the left tensor that stay, those that are summed over, new ones, axes of the constant); None if no map."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    summed = "".join(axis for axis in left if axis in right)
    stays, new = left.removesuffix(summed), output[len(left) - len(summed) :]
    is_map = summed and new and left == stays + summed and output == stays + new and sorted(right) == sorted(summed + new)
    return (len(stays), summed, new, right) if is_map else None


def _product(
    model: onnx.ModelProto, node: onnx.NodeProto, weight: np.ndarray, stays: int, summed: str, new: str, right: str
) -> list[onnx.NodeProto]:
    size = dict(zip(right, weight.shape, strict=True))
    inputs, outputs = (int(np.prod([size[axis] for axis in axes])) for axes in (summed, new))
    matrix_IO = weight.transpose([right.index(axis) for axis in summed + new]).reshape(inputs, outputs)
    name, left, nodes = node.name, node.input[0], []

    def constant(suffix: str, value: np.ndarray) -> str:
        model.graph.initializer.append(numpy_helper.from_array(value, f"{name}_{suffix}"))
        return f"{name}_{suffix}"

    if len(summed) > 1:
        shape = constant("rows", np.array([0] * stays + [inputs], dtype=np.int64))
        nodes.append(helper.make_node("Reshape", [left, shape], [f"{name}_flat"], name=f"{name}_flatten"))
        left = f"{name}_flat"
    product = f"{name}_product" if len(new) > 1 else node.output[0]
    nodes.append(helper.make_node("MatMul", [left, constant("matrix", np.ascontiguousarray(matrix_IO))], [product], name=name))
    if len(new) > 1:
        shape = constant("shape", np.array([0] * stays + [size[axis] for axis in new], dtype=np.int64))
        nodes.append(helper.make_node("Reshape", [product, shape], list(node.output), name=f"{name}_split"))
    return nodes
