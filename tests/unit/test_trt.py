"""The TensorRT builder. `tensorrt_rtx` builds without a GPU; running an engine needs one."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from engine.errors import UserError
from export.compress.quantize import quantize_embeddings, quantize_matmuls, tensorrt_form, watch_activations
from export.engines import trt as module
from export.engines.graph import export_onnx, merge_projections
from export.engines.ort import OrtEngine
from export.engines.parity import ParityGates, observe, run_of
from export.engines.trt import Profile, TrtEngine, build_engine, parse_network, quantized_matmuls, tensorrt_module
from export.export import ExportConfig, gate_others
from tests.unit.models import GRAPH, tiny_classifier
from tests.unit.test_engines import ROWS, examples, logits_of, task  # noqa: F401 - fixtures

pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
PROFILE = Profile(4, 8, 16, 48)


@pytest.fixture(scope="module")
def quantized(task, examples):  # noqa: F811
    graph = export_onnx(tiny_classifier(initializer_range=0.2), GRAPH)
    merge_projections(graph)
    quantize_matmuls(graph, watch_activations(graph, task, examples))
    quantize_embeddings(graph)
    return graph


def parse(graph):
    trt = tensorrt_module("tensorrt_rtx")
    return trt, parse_network(trt, graph.SerializeToString())


def test_the_int8_graph_builds_and_every_weight_product_reads_two_int8_inputs(quantized):
    trt, parsed = parse(tensorrt_form(quantized))
    both, one = quantized_matmuls(trt, parsed.network)
    assert len(both) == 8 and not one
    assert len(build_engine(trt, parsed, PROFILE, positions=64)) > 10_000


def test_a_float_graph_builds_too_and_has_no_quantized_product():
    trt, parsed = parse(export_onnx(tiny_classifier(), GRAPH))
    assert quantized_matmuls(trt, parsed.network) == ([], [])
    assert build_engine(trt, parsed, PROFILE)


def test_the_walk_finds_a_product_that_lost_the_pair_on_one_side(quantized):
    graph = tensorrt_form(quantized)
    maker = {name: node for node in graph.graph.node for name in node.output}
    product = next(n for n in graph.graph.node if n.op_type == "MatMul" and "quantize" in maker[n.input[0]].name)
    product.input[0] = maker[maker[product.input[0]].input[0]].input[0]
    trt, parsed = parse(graph)
    both, one = quantized_matmuls(trt, parsed.network)
    assert len(both) == 7 and len(one) == 1


def test_a_profile_beyond_the_models_positions_is_refused(quantized):
    trt, parsed = parse(tensorrt_form(quantized))
    with pytest.raises(UserError, match="max_length=48 is above the model's 32 positions"):
        build_engine(trt, parsed, PROFILE, positions=32)


def test_a_graph_that_the_parser_refuses_is_one_line():
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", [value], [value])
    with pytest.raises(UserError, match="cannot parse the ONNX model"):
        parse(helper.make_model(graph))


def test_a_missing_package_is_named_with_its_installation():
    with pytest.raises(UserError, match="pip install"):
        tensorrt_module("tensorrt_that_is_not_there")


def test_the_profile_is_tuned_for_the_measured_lengths():
    profile = Profile.of_lengths(np.asarray([10] * 89 + [50] * 11), max_batch=32, max_length=128)
    assert profile.shapes() == [(1, 1), (8, 56), (32, 128)]
    assert Profile.of_lengths(np.asarray([100]), 1, 64).shapes() == [(1, 1), (1, 64), (1, 64)]


def test_an_engine_without_a_gpu_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no NVIDIA GPU here: use the onnxruntime engine"):
        TrtEngine(tmp_path / "model.engine", "tensorrt_rtx")


class Context:
    """An execution context that refuses what its test says."""

    def __init__(self, refuses):
        self.refuses = refuses

    def set_input_shape(self, name, shape):
        return self.refuses != "shape"

    def get_tensor_shape(self, name):
        return (2, 3)

    def set_tensor_address(self, name, address):
        return self.refuses != "address"

    def execute_async_v3(self, stream):
        return self.refuses != "run"


class Engine:
    """A compiled engine with one input and one output."""

    def __init__(self, kind):
        self.kind = kind

    def get_tensor_dtype(self, name):
        return f"DataType.{self.kind if name == 'logits' else 'INT64'}"

    def get_tensor_profile_shape(self, name, index):
        return (1, 1), (4, 16), (8, 48)


@pytest.fixture
def engine(monkeypatch):
    """Makes a TrtEngine over a context that refuses one call, with tensors on the CPU."""
    make, empty = torch.tensor, torch.empty
    monkeypatch.setattr(torch, "tensor", lambda value, device: make(value))
    monkeypatch.setattr(torch, "empty", lambda shape, device: empty(shape))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def made(refuses=None, kind="FLOAT"):
        found = TrtEngine.__new__(TrtEngine)
        found.path, found.engine, found.context = Path("model.engine"), Engine(kind), Context(refuses)
        found.inputs, found.outputs, found.stream = ["input_ids"], ["logits"], SimpleNamespace(cuda_stream=0)
        return found

    return made


@pytest.mark.parametrize(
    ("refuses", "kind", "error", "message"),
    [
        ("shape", "FLOAT", UserError, r"input_ids of shape \(2, 5\): it takes \(1, 1\) to \(8, 48\)"),
        ("address", "FLOAT", RuntimeError, "does not take the memory of input_ids"),
        ("run", "FLOAT", RuntimeError, "could not run the engine"),
        (None, "HALF", RuntimeError, "logits is HALF in the engine and torch.float32 outside it"),
    ],
)
def test_what_an_engine_refuses_is_an_error_and_no_answer(engine, refuses, kind, error, message):
    with pytest.raises(error, match=message):
        engine(refuses, kind).run({"input_ids": np.zeros((2, 5), np.int64)})


def test_an_engine_that_refuses_nothing_answers(engine):
    assert engine().run({"input_ids": np.zeros((2, 5), np.int64)})["logits"].shape == (2, 3)


@pytest.fixture
def shipped(quantized, task, tmp_path):  # noqa: F811
    """(configuration of an export, its engines, rows, what the embedded engine gave)."""
    (tmp_path / "model.onnx").write_bytes(quantized.SerializeToString())
    engines = {"model": {"onnxruntime": tmp_path / "model.onnx", "tensorrt": tmp_path / "model.onnx"}}
    config = ExportConfig.model_construct(backends=["onnxruntime", "tensorrt"], gates=ParityGates(), max_length=32, max_batch=4)
    run = run_of({"model": OrtEngine(tmp_path / "model.onnx", 1)})
    return config, engines, task.answers, ROWS, observe(run, task.answers, ROWS)


class Stand(OrtEngine):
    """ONNX Runtime in the place of TensorRT; it counts the rows of a call, and may move its outputs."""

    largest, moved = 0, 0.0

    def __init__(self, path, backend):
        super().__init__(path, 1)

    def run(self, arrays):
        rows = len(next(iter(arrays.values())))
        Stand.largest = max(Stand.largest, rows)
        return {name: value + Stand.moved * rows for name, value in super().run(arrays).items()}


def test_an_engine_that_this_machine_runs_passes_the_gates_before_it_ships(shipped, monkeypatch):
    monkeypatch.setattr(module, "why_not_run", lambda backend: None)
    monkeypatch.setattr(module, "TrtEngine", Stand)
    monkeypatch.setattr(Stand, "largest", 0)
    found, runs = gate_others(*shipped)
    assert found["tensorrt"]["agreement"] == 1.0 and list(runs) == ["tensorrt"]
    assert 1 < Stand.largest <= shipped[0].max_batch
    monkeypatch.setattr(Stand, "moved", 0.5)
    with pytest.raises(UserError, match=r"^tensorrt: the engine's model/logits depend on batch"):
        gate_others(*shipped)


def test_an_engine_that_this_machine_cannot_run_is_said_and_recorded(shipped, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, runs = gate_others(*shipped)
    assert found == {"tensorrt": {"not_run": "there is no NVIDIA GPU here"}} and runs == {}
    assert "tensorrt: there is no NVIDIA GPU here: its answers, outputs and times were not looked at" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_the_compiled_engine_agrees_with_onnx_runtime(quantized, task, backend, tmp_path):  # noqa: F811
    pytest.importorskip(backend)
    trt = tensorrt_module(backend)
    parsed = parse_network(trt, tensorrt_form(quantized).SerializeToString())
    (tmp_path / "model.engine").write_bytes(build_engine(trt, parsed, PROFILE, positions=64))
    compiled = logits_of(TrtEngine(tmp_path / "model.engine", backend), task, ROWS, batch=8)
    expected = logits_of(OrtEngine(quantized.SerializeToString(), 1), task, ROWS, batch=8)
    assert (compiled.argmax(1) == expected.argmax(1)).mean() >= 0.95
    np.testing.assert_allclose(compiled, expected, atol=0.1 * np.ptp(expected))
