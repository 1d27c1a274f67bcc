"""Tensors of the Open Inference Protocol v2: every datatype, as raw bytes, as JSON and as typed contents of gRPC.

Inside, a tensor is a NumPy array: BYTES are objects of bytes, BF16 is float32, which NumPy has not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np


class RequestError(Exception):
    """A request that is not answered. `status` is the HTTP status; each transport maps it to its own codes."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


NUMPY = {
    "BOOL": "?",
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": f"<f{size}" for size in (2, 4, 8)},
    "BF16": "<f4",
}
"""NumPy's names of the datatypes; BYTES are objects."""
_CONTENTS = {
    "bool_contents": ("BOOL",),
    "int_contents": ("INT8", "INT16", "INT32"),
    "int64_contents": ("INT64",),
    "uint_contents": ("UINT8", "UINT16", "UINT32"),
    "uint64_contents": ("UINT64",),
    "fp32_contents": ("FP32",),
    "fp64_contents": ("FP64",),
    "bytes_contents": ("BYTES",),
}
"""Fields of the protocol's InferTensorContents and what may lie in them; FP16 and BF16 have none."""


def from_bytes(data: bytes, datatype: str, count: int, where: str) -> np.ndarray:
    """Reads `count` elements of the binary form, shape (count,).

    Args:
        where: names the tensor in an error.

    Raises:
        RequestError: another number of bytes than the elements need.
    """
    if datatype != "BYTES":
        dtype = np.dtype("<u2" if datatype == "BF16" else NUMPY[datatype])
        if len(data) != count * dtype.itemsize:
            raise RequestError(f"{where} has {len(data)} bytes, but {count} elements of {datatype} need {count * dtype.itemsize}")
        values = np.frombuffer(data, dtype)
        return (values.astype("<u4") << 16).view("<f4") if datatype == "BF16" else values
    elements: list[bytes] = []
    offset = 0
    while offset < len(data):
        end = offset + 4 + (struct.unpack_from("<I", data, offset)[0] if offset + 4 <= len(data) else 0)
        if offset + 4 > len(data) or end > len(data):
            raise RequestError(f"{where}: element {len(elements)} ends after the data: each is 4 bytes of length and its bytes")
        elements.append(data[offset + 4 : end])
        offset = end
    return objects(elements)


def to_bytes(array: np.ndarray, datatype: str) -> bytes:
    """Returns a tensor in the binary form of the protocol."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in array.ravel())
    array = np.ascontiguousarray(array, NUMPY[datatype])
    return (array.view("<u4") >> 16).astype("<u2").tobytes() if datatype == "BF16" else array.tobytes()


def from_list(data: list[Any], datatype: str, depth: int, where: str) -> np.ndarray:
    """Reads the data of a JSON request, nested as the shape is or flat; returns shape (elements,).

    Args:
        depth: dimensions of the tensor.

    Raises:
        RequestError: an element that is none of the datatype.
    """
    if datatype in ("FP16", "BF16"):
        raise RequestError(f"{where}: JSON has no form for {datatype}: send it in binary (binary_data_size)")
    for _ in range(depth - 1):
        if data and all(isinstance(part, list) for part in data):
            data = [item for part in data for item in part]
    kind, article = _json_kind(datatype)
    for item in data:
        if not isinstance(item, kind) or (isinstance(item, bool) and datatype != "BOOL"):
            raise RequestError(f"{where}: an element is {type(item).__name__}, not {article}: {str(item)[:40]}")
    if datatype == "BYTES":
        return objects([item.encode() for item in data])
    return _numbers(data, datatype, where)


def to_list(array: np.ndarray, datatype: str, where: str) -> list[Any]:
    """Returns a tensor as the flat list of a JSON response.

    Raises:
        RequestError: a datatype that JSON has no form for.
    """
    if datatype in ("FP16", "BF16"):
        raise RequestError(f"{where}: JSON has no form for {datatype}: ask for it in binary (binary_data)")
    return [value.decode() for value in array.ravel()] if datatype == "BYTES" else array.ravel().tolist()


def from_contents(contents: Any, datatype: str, where: str) -> np.ndarray:
    """Reads the typed contents of a gRPC request (InferTensorContents), shape (elements,).

    Raises:
        RequestError: elements in a field that does not hold the datatype, or outside its range.
    """
    filled = [field.name for field, _ in contents.ListFields()]
    for name in filled:
        if datatype not in _CONTENTS[name]:
            right = next((field for field, held in _CONTENTS.items() if datatype in held), "raw_input_contents")
            raise RequestError(f"{where}: {name} does not hold {datatype}: use {right}")
    values = getattr(contents, filled[0]) if filled else []
    return objects(list(values)) if datatype == "BYTES" else _numbers(values, datatype, where)


def objects(values: list[bytes]) -> np.ndarray:
    """Returns bytes as an array of objects, shape (elements,)."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array


def _json_kind(datatype: str) -> tuple[Any, str]:
    if datatype == "BYTES":
        return str, "a string"
    if datatype == "BOOL":
        return bool, "true or false"
    return (int, "an integer") if "INT" in datatype else ((int, float), "a number")


def _numbers(values: Sequence[Any], datatype: str, where: str) -> np.ndarray:
    if "INT" in datatype:
        limits = np.iinfo(NUMPY[datatype])
        if len(values) and not (limits.min <= min(values) and max(values) <= limits.max):
            raise RequestError(f"{where}: an element is outside the range of {datatype}")
    return np.array(values, dtype=NUMPY[datatype])
