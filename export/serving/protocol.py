"""Open Inference Protocol v2, whatever the transport: what a request may hold, tensors in and out, metadata.

Everything that is checked comes from the model's config.pbtxt, the file that Triton reads too.

Shapes: B rows of one request, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import descriptor, json_format, message, text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.service_pb2 import InferTensorContents

from export.serving.tensors import RequestError, from_bytes, from_contents, from_list
from export.serving.triton import VERSION

Arrays = dict[str, np.ndarray]
"""Tensors by name; BYTES tensors are object arrays of bytes."""


@dataclass(frozen=True)
class Given:
    """An input tensor as it came: `data` is raw bytes, the list of a JSON request, or the typed contents of a gRPC request."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes | list[Any] | InferTensorContents


@dataclass(frozen=True)
class Wanted:
    """A requested output: as a tensor, or with `classes` as the best classes of each row ("score:index:label")."""

    name: str
    classes: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model; `dims` leave the batch out, -1 stands for any size."""

    name: str
    datatype: str
    dims: tuple[int, ...]


class ModelSpec:
    """What one model takes and gives.

    Args:
        config: parsed config.pbtxt.
        labels: class names, for the classification extension.
    """

    def __init__(self, config: model_config_pb2.ModelConfig, labels: list[str]) -> None:
        self.config, self.name, self.labels = config, config.name, labels
        self.inputs = {item.name: _spec(item) for item in config.input}
        self.outputs = {item.name: _spec(item) for item in config.output}
        self.classified = {item.name for item in config.output if item.label_filename}

    @property
    def max_batch(self) -> int:
        """Rows of one execution, and of one request."""
        return self.config.max_batch_size

    @property
    def merges(self) -> bool:
        """Requests that wait are executed together."""
        return self.config.HasField("dynamic_batching")

    @property
    def delay(self) -> float:
        """Seconds that a request waits for others."""
        return self.config.dynamic_batching.max_queue_delay_microseconds / 1e6

    @classmethod
    def parse(cls, text: str, labels: list[str]) -> ModelSpec:
        """Reads a config.pbtxt."""
        return cls(text_format.Parse(text, model_config_pb2.ModelConfig()), labels)

    def metadata(self) -> dict[str, Any]:
        """Returns the model metadata of the protocol."""

        def tensors(specs: dict[str, TensorSpec]) -> list[dict[str, Any]]:
            return [{"name": item.name, "datatype": item.datatype, "shape": [-1, *item.dims]} for item in specs.values()]

        platform = self.config.platform or self.config.backend
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": platform,
            "inputs": tensors(self.inputs),
            "outputs": tensors(self.outputs),
        }

    def read(self, given: list[Given]) -> Arrays:
        """Turns the inputs of a request into arrays with the same number of rows.

        Raises:
            RequestError: a name, datatype, shape, batch or size that the model does not take.
        """
        names = [item.name for item in given]
        for name in names:
            if name not in self.inputs:
                raise RequestError(f"model '{self.name}' has no input '{name}'; its inputs are {', '.join(self.inputs)}")
        if len(set(names)) < len(names):
            raise RequestError(f"an input of model '{self.name}' is given twice: {', '.join(names)}")
        for name in self.inputs:
            if name not in names:
                raise RequestError(f"input '{name}' of model '{self.name}' is missing")
        arrays = {item.name: _array(item, self.inputs[item.name]) for item in given}
        rows = {len(array) for array in arrays.values()}
        if len(rows) > 1:
            raise RequestError(f"the inputs of a request have different batch sizes: {sorted(rows)}")
        if not 1 <= min(rows) <= self.max_batch:
            raise RequestError(f"model '{self.name}' takes 1 to {self.max_batch} rows a request, not {min(rows)}")
        return arrays

    def wanted(self, given: list[Wanted]) -> list[Wanted]:
        """Returns the outputs to send: those asked for, or all.

        Raises:
            RequestError: an unknown output, or classes of an output that has none.
        """
        for item in given:
            if item.name not in self.outputs:
                raise RequestError(f"model '{self.name}' has no output '{item.name}'; its outputs are {', '.join(self.outputs)}")
            if item.classes and item.name not in self.classified:
                raise RequestError(f"output '{item.name}' has no labels: ask for it without a class count")
        return given or [Wanted(name) for name in self.outputs]

    def output(self, wanted: Wanted, outputs: Arrays) -> tuple[str, np.ndarray]:
        """Returns (datatype, array) of one requested output."""
        array = outputs[wanted.name]
        if not wanted.classes:
            return self.outputs[wanted.name].datatype, array
        best_BK = np.argsort(-array, axis=1, kind="stable")[:, : wanted.classes]
        scored = zip(array, best_BK, strict=True)
        rows = [[f"{row[index]:f}:{index}:{self.labels[index]}".encode() for index in best] for row, best in scored]
        return "BYTES", np.array(rows, dtype=np.object_)


def _spec(item: model_config_pb2.ModelInput | model_config_pb2.ModelOutput) -> TensorSpec:
    datatype = model_config_pb2.DataType.Name(item.data_type).removeprefix("TYPE_")
    return TensorSpec(item.name, "BYTES" if datatype == "STRING" else datatype, tuple(item.dims))


def _array(given: Given, spec: TensorSpec) -> np.ndarray:
    where = f"input '{given.name}'"
    if given.datatype != spec.datatype:
        raise RequestError(f"{where} has datatype {given.datatype}, not {spec.datatype}")
    shape = given.shape
    expected = [-1, *spec.dims]
    fits = len(shape) == len(expected) and all(size in (-1, own) for size, own in zip(expected, shape, strict=True))
    if not fits or min(shape, default=0) < 0:
        raise RequestError(f"{where} has shape {shape}, not {expected}")
    count = math.prod(shape)
    if isinstance(given.data, bytes):
        values = from_bytes(given.data, spec.datatype, count, where)
    elif isinstance(given.data, list):
        values = from_list(given.data, spec.datatype, len(shape), where)
    else:
        values = from_contents(given.data, spec.datatype, where)
    if len(values) != count:
        raise RequestError(f"{where} has {len(values)} elements, but shape {shape} needs {count}")
    return values.reshape(shape)


def to_json(value: message.Message) -> dict[str, Any]:
    """Returns a protobuf message as Triton writes it in JSON: original names, defaults included, 64-bit integers as numbers."""
    plain = json_format.MessageToDict(value, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _numbers(plain, value.DESCRIPTOR)


def _numbers(plain: dict[str, Any], kind: descriptor.Descriptor) -> dict[str, Any]:
    for field in kind.fields:
        item = plain.get(field.name)
        if item is None:
            continue
        if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
            plain[field.name] = [int(each) for each in item] if isinstance(item, list) else int(item)
        elif field.message_type and not field.message_type.GetOptions().map_entry:
            for part in item if isinstance(item, list) else [item]:
                _numbers(part, field.message_type)
    return plain
