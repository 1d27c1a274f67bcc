"""int8 products are exact: on this CPU, in a model of one that saturates, and on an emulated one.

Shapes: M rows, I inputs, O outputs.
"""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.compress.quantize import PAIR_LIMIT, quantize_matmuls, quantize_weight
from tests.unit.emulated import run_emulated
from tests.unit.int8_products import FILLS, SHAPES, one_product, saturating, unsmoothed, values, worst

EXACT = 1e-6
"""Scales are float32: integers that agree differ by this much at most."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weights", "wide"), [("portable", False), ("8bit", True)])
def test_the_engine_gives_what_integer_arithmetic_gives(shape, weights, wide):
    assert worst(shape, weights, wide) < EXACT


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=st.floats(-4, 4, width=32)))
def test_portable_weights_leave_no_pair_room_to_saturate_and_cost_at_most_one_bit(weight_IO):
    int8_IO, scale_O = quantize_weight(weight_IO, "portable")
    wide = np.pad(int8_IO.astype(np.int64), ((0, len(int8_IO) % 2), (0, 0)))
    for sign in (1, -1):
        assert np.maximum(sign * wide, 0).reshape(-1, 2, wide.shape[1]).sum(axis=1).max() <= PAIR_LIMIT
    assert np.abs(wide).max() <= 127
    assert (np.abs(int8_IO * scale_O - weight_IO) <= 0.5001 * scale_O + 1e-12).all()
    assert (scale_O <= 2 * quantize_weight(weight_IO, "8bit")[1]).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", FILLS)
def test_arithmetic_that_saturates_in_16_bits_is_exact_with_portable_weights(shape, fill):
    rng = np.random.default_rng(0)
    rows, inputs, outputs = shape
    int8_IO, _ = quantize_weight(values(fill, (inputs, outputs), rng), "portable")
    for uint8_MI in (rng.choice([0, 255], (rows, inputs)), np.full((rows, inputs), 255), rng.integers(0, 256, (rows, inputs))):
        assert (saturating(uint8_MI, int8_IO) == uint8_MI.astype(np.int64) @ int8_IO.astype(np.int64)).all()


def test_arithmetic_that_saturates_in_16_bits_is_wrong_with_8_bit_weights():
    int8_IO, _ = quantize_weight(values("ends", (384, 64), np.random.default_rng(0)), "8bit")
    uint8_MI = np.full((4, 384), 255)
    exact = uint8_MI.astype(np.int64) @ int8_IO.astype(np.int64)
    assert np.abs(saturating(uint8_MI, int8_IO) - exact).max() > 0.2 * np.ptp(exact)


def test_the_quantized_graph_is_valid_and_portable_is_the_default():
    weight_IO = values("top", (4, 3), np.random.default_rng(0))
    model = one_product(weight_IO)
    quantize_matmuls(model, {"x": unsmoothed(4)})
    onnx.checker.check_model(model)
    int8_IO = next(onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "w_int8")
    assert (int8_IO == quantize_weight(weight_IO, "portable")[0]).all() and int8_IO.max() == PAIR_LIMIT // 2


def test_the_kernels_of_a_cpu_without_vnni_saturate_as_the_model_says_and_are_exact_with_portable_weights(tmp_path):
    found = json.loads(run_emulated(tmp_path, "from tests.unit import int8_products; int8_products.main()"))
    from_integers, from_saturating = found["8bit"]
    assert from_integers > 0.1 and from_saturating < EXACT
    assert found["portable"] < EXACT and found["8bit, wide"] < EXACT
