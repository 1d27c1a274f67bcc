"""Our int8 ranges against those of another implementation (nvidia-modelopt) on the same model and rows."""

import copy

import numpy as np
import onnx
import pytest
import torch

from export.compress.quantize import Activation, quantize_matmuls, watch_activations
from export.engines.graph import export_onnx, initializers, weight_matmuls
from tests.unit.models import GRAPH, tiny_classifier
from tests.unit.test_engines import examples, task  # noqa: F401 - fixtures


def test_ranges_and_weight_scales_are_those_of_modelopt(task, examples):  # noqa: F811
    quantization = pytest.importorskip("modelopt.torch.quantization", reason="the extra `modelopt` is not installed")
    model = tiny_classifier(initializer_range=0.2)
    graph = export_onnx(model, GRAPH)
    products = weight_matmuls(graph)
    seen = watch_activations(graph, task, examples)

    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    by_weight = {module.weight.detach().numpy().T.tobytes(): name for name, module in linear.items()}
    config = copy.deepcopy(quantization.INT8_DEFAULT_CFG)

    def calibrate(module):
        with torch.no_grad():
            for example in examples:
                task.forward(module, task.collate([example]))

    reference = quantization.quantize(copy.deepcopy(model), config, calibrate)
    modules = dict(reference.named_modules())
    plain = {name: Activation(found.largest_I, found.sample_SI[:0]) for name, found in seen.items()}  # theirs smooths nothing
    quantize_matmuls(graph, plain, "8bit")
    constants = initializers(graph)
    assert len(products) == 12
    for node, weight in products:
        theirs = modules[by_weight[weight.tobytes()]]
        # Rows run alone there and with others of their length here: padding widens neither range.
        assert seen[node.input[0]].largest_I.max() == pytest.approx(float(theirs.input_quantizer.amax), rel=1e-4)
        scale = onnx.numpy_helper.to_array(constants[f"{node.input[1]}_scale"])
        np.testing.assert_allclose(scale * 127, theirs.weight_quantizer.amax.numpy().ravel(), rtol=1e-5)
