"""int8 products and what they have to give. `main` prints how far a CPU is from it, as JSON.

Shapes: M rows, I inputs, O outputs.
"""

import json

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export.compress.quantize import Activation, quantize_matmuls, quantize_weight
from export.engines.ort import session

SHAPES = [(1, 1, 1), (1, 2, 3), (2, 3, 5), (1, 7, 8), (3, 8, 16), (5, 64, 33), (1, 384, 64), (32, 384, 64), (4, 1537, 17)]
FILLS = ["ends", "top", "normal"]


def values(fill, shape, rng):
    """Weights or activations between -1 and 1: all at one end, at both ends, or mostly small."""
    if fill == "top":
        return np.ones(shape, dtype=np.float32)
    if fill == "ends":
        return rng.choice(np.float32([-1, 1]), shape)
    drawn = rng.standard_normal(shape).astype(np.float32)
    return drawn / np.abs(drawn).max()


def one_product(weight_IO):
    """Returns a float graph of a single MatMul."""
    inputs, outputs = weight_IO.shape
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [value("x", TensorProto.FLOAT, ["rows", inputs])],
        [value("y", TensorProto.FLOAT, ["rows", outputs])],
        [numpy_helper.from_array(weight_IO, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def unsmoothed(inputs):
    """Returns an activation between -1 and 1 that leaves the weights as they are."""
    return Activation(np.ones(inputs, dtype=np.float32), np.zeros((0, inputs), dtype=np.float32))


def product(weight_IO, x_MI, weights, wide=False):
    """Returns (what ONNX Runtime gives, what integer arithmetic gives) for the quantized product, both (M, O)."""
    model = one_product(weight_IO)
    quantize_matmuls(model, {"x": unsmoothed(len(weight_IO))}, weights)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    got = session(model.SerializeToString(), 1, wide).run(["y"], {"x": x_MI})[0]
    scale = constants["product_scale"]
    int8_MI = np.clip(np.rint(x_MI / scale), -128, 127).astype(np.int64)
    return got, (int8_MI @ constants["w_int8"].astype(np.int64)) * (scale * constants["w_scale"])


def saturating(uint8_MI, int8_IO):
    """The product as VPMADDUBSW and VPMADDWD form it: two neighbours are added in 16 bits that saturate, the rest in 32 bits."""
    odd = len(int8_IO) % 2
    left = np.pad(uint8_MI.astype(np.int64), ((0, 0), (0, odd))).reshape(len(uint8_MI), -1, 2)
    right = np.pad(int8_IO.astype(np.int64), ((0, odd), (0, 0))).reshape(-1, 2, int8_IO.shape[1])
    return np.clip(np.einsum("mpi,pio->mpo", left, right), -(2**15), 2**15 - 1).sum(axis=1)


def off(got, wanted):
    """Returns the largest difference relative to the largest number."""
    return float(np.abs(got - wanted).max() / max(1e-6, np.abs(wanted).max()))


def worst(shape, weights, wide=False):
    """Returns how far ONNX Runtime is from integer arithmetic at worst, over weights and activations of all kinds."""
    rows, inputs, outputs = shape
    rng = np.random.default_rng(0)
    found = 0.0
    for weight_fill in FILLS:
        weight_IO = values(weight_fill, (inputs, outputs), rng)
        for fill in FILLS:
            # Activations beyond the calibrated range end at -128 and 127.
            found = max(found, off(*product(weight_IO, 1.5 * values(fill, (rows, inputs), rng), weights, wide)))
    return found


def saturated():
    """Returns how far 8-bit weights are off (from integer arithmetic, from arithmetic that saturates) without wide sums."""
    rng = np.random.default_rng(0)
    weight_IO, x_MI = values("ends", (384, 64), rng), values("top", (4, 384), rng)
    got, exact = product(weight_IO, x_MI, "8bit")
    int8_IO, scale_O = quantize_weight(weight_IO, "8bit")
    # ONNX Runtime shifts activations to unsigned ones and takes the shift out again, exactly.
    shifted = saturating(np.full((4, 384), 127 + 128), int8_IO) - 128 * int8_IO.astype(np.int64).sum(axis=0)
    return off(got, exact), off(got, shifted * scale_O / np.float32(127))


def main():
    """Prints how far this CPU is from integer arithmetic."""
    found = {"portable": max(worst(shape, "portable") for shape in SHAPES)}
    found["8bit, wide"] = max(worst(shape, "8bit", True) for shape in SHAPES)
    print(json.dumps({**found, "8bit": saturated()}))
