"""TensorRT engines: one builder for `tensorrt` 10 and 11 and for `tensorrt_rtx`, which builds without a GPU.

Networks are strongly typed: the precision is what the ONNX says (Q/DQ pairs), so that one ONNX serves all three packages.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import UserError

PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
"""Python module → distribution that brings it; the module's name is the backend's name in recipes."""

RTX = {(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities that TensorRT-RTX runs on (its support matrix, versions 1.0 to 1.5); 12.1 from 1.5 on."""
TYPES = {"FLOAT": "torch.float32", "INT32": "torch.int32", "INT64": "torch.int64", "BOOL": "torch.bool"}
"""TensorRT's names of types, and torch's."""


@dataclass(frozen=True)
class Profile:
    """Optimization profile: the shapes an engine accepts, and the one it is tuned for."""

    opt_batch: int
    max_batch: int
    opt_length: int
    max_length: int

    @classmethod
    def of_lengths(cls, lengths: np.ndarray, max_batch: int, max_length: int) -> Profile:
        """Tunes for the 90th percentile of the measured lengths, rounded up to a multiple of 8, at a quarter of the batch."""
        length = int(-(-np.percentile(lengths, 90) // 8) * 8)
        return cls(max(1, max_batch // 4), max_batch, min(length, max_length), max_length)

    def shapes(self) -> list[tuple[int, int]]:
        """Returns the smallest, the tuned and the largest (batch, length)."""
        return [(1, 1), (self.opt_batch, self.opt_length), (self.max_batch, self.max_length)]


def tensorrt_module(backend: str) -> Any:
    """Imports the package of a backend.

    Raises:
        UserError: it is not installed, or installed without its libraries.
    """
    try:
        module = importlib.import_module(backend)
        module.Builder  # noqa: B018 - the stub distribution imports but has nothing in it
    except (ImportError, OSError, AttributeError):
        raise UserError(
            f"backend {backend} needs the package {PACKAGES.get(backend, backend)}: pip install {PACKAGES.get(backend, backend)}"
        ) from None
    return module


def why_not_run(backend: str) -> str | None:
    """Returns why no engine of a backend runs on this machine, None where one does."""
    import torch

    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU here"
    major, minor = torch.cuda.get_device_capability()
    if backend == "tensorrt_rtx" and (major, minor) not in RTX:
        return f"TensorRT-RTX does not run on GPUs of kind sm_{major}{minor}"
    return None


class Parsed(NamedTuple):
    """A parsed network with what must outlive its build: the parser owns the weights."""

    builder: Any
    network: Any
    parser: Any


def parse_network(trt: Any, model: bytes) -> Parsed:
    """Parses an ONNX model.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: the bytes of the ONNX file; inputs of shape (batch, length).

    Raises:
        UserError: an operator or a form that the parser refuses.
    """
    builder = trt.Builder(_logger(trt))
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse(model):
        raise UserError(f"{trt.__name__} cannot parse the ONNX model: {parser.get_error(0).desc()}")
    return Parsed(builder, network, parser)


def quantized_matmuls(trt: Any, network: Any) -> tuple[list[str], list[str]]:
    """Walks a network for its matrix products.

    Returns:
        (names of those whose inputs both come from a DequantizeLinear of int8, names of those with exactly one such input).
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    maker = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def is_dequantized(tensor: Any) -> bool:
        layer = maker.get(tensor.name)
        # The parser reshapes weights to the rank of the activations.
        while layer is not None and layer.type == trt.LayerType.SHUFFLE:
            layer = maker.get(layer.get_input(0).name)
        return layer is not None and layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).dtype == trt.int8

    products = [layer for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY]
    count = {layer.name: sum(is_dequantized(layer.get_input(index)) for index in (0, 1)) for layer in products}
    return [name for name, both in count.items() if both == 2], [name for name, both in count.items() if both == 1]


def build_engine(trt: Any, parsed: Parsed, profile: Profile, positions: int | None = None) -> bytes:
    """Compiles a parsed network into a serialized engine.

    Args:
        trt: `tensorrt` (needs a GPU) or `tensorrt_rtx`.
        profile: accepted shapes.
        positions: position embeddings of the model; builders do not notice a profile that goes beyond them.

    Raises:
        UserError: the profile is longer than the model, or the builder gives up.
    """
    if positions is not None and profile.max_length > positions:
        raise UserError(f"max_length={profile.max_length} is above the model's {positions} positions: lower max_length")
    network = parsed.network
    config = parsed.builder.create_builder_config()
    shapes = parsed.builder.create_optimization_profile()
    for index in range(network.num_inputs):
        shapes.set_shape(network.get_input(index).name, *profile.shapes())
    config.add_optimization_profile(shapes)
    serialized = parsed.builder.build_serialized_network(network, config)
    if serialized is None:
        raise UserError(f"{trt.__name__} could not build the engine: its messages are above")
    return bytes(serialized)


class TrtEngine:
    """A compiled engine on a GPU; buffers are torch tensors.

    Raises:
        UserError: no GPU, no package, an engine of another version or GPU, or a batch that it does not take.
    """

    def __init__(self, path: Path, backend: str) -> None:
        import torch

        if reason := why_not_run(backend):
            raise UserError(f"{path}: an engine for {backend}: {reason}: use the onnxruntime engine")
        trt = tensorrt_module(backend)
        self.engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise UserError(f"{path}: built by another {backend} version or for another GPU: export again on this machine")
        self.path, self.context = path, self.engine.create_execution_context()
        if self.context is None:
            raise UserError(f"{path}: the GPU has no memory left for this engine: free some, or lower max_batch")
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.stream = torch.cuda.Stream()

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch: the inputs by name (others are left alone) → the outputs by name, float32."""
        import torch

        with torch.cuda.stream(self.stream):
            tensors = {name: torch.tensor(arrays[name], device="cuda") for name in self.inputs}
            for name, tensor in tensors.items():
                # TensorRT answers False to what it does not take, and would leave the outputs as they are.
                if not self.context.set_input_shape(name, tuple(tensor.shape)):
                    low, _, high = self.engine.get_tensor_profile_shape(name, 0)
                    raise UserError(f"{self.path}: {name} of shape {tuple(tensor.shape)}: it takes {tuple(low)} to {tuple(high)}")
                self._bind(name, tensor)
            outputs = {}
            for name in self.outputs:
                outputs[name] = torch.empty(tuple(self.context.get_tensor_shape(name)), device="cuda")
                self._bind(name, outputs[name])
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise RuntimeError(f"{self.path}: TensorRT could not run the engine: its messages are above")
            return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}

    def _bind(self, name: str, tensor: Any) -> None:
        kind = str(self.engine.get_tensor_dtype(name)).rpartition(".")[2]
        if TYPES.get(kind) != str(tensor.dtype):
            raise RuntimeError(f"{self.path}: {name} is {kind} in the engine and {tensor.dtype} outside it")
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise RuntimeError(f"{self.path}: TensorRT does not take the memory of {name}")


def _logger(trt: Any) -> Any:
    return trt.Logger(trt.Logger.ERROR)
