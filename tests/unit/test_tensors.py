"""Tensors of the Open Inference Protocol: raw bytes, JSON and arrays say the same for every datatype."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from export.serving.tensors import NUMPY, RequestError, from_bytes, from_list, objects, to_bytes, to_list

IN_JSON = [datatype for datatype in NUMPY if datatype not in ("FP16", "BF16")]


def tensors(datatype):
    """Draws arrays of a datatype; those of BF16 have the low half of every float32 empty."""
    if datatype == "BYTES":
        return st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(lambda texts: objects([t.encode() for t in texts]))
    if datatype == "BF16":
        return arrays("<u4", st.integers(0, 9)).map(lambda bits: (bits & 0xFFFF0000).view("<f4"))
    return arrays(NUMPY[datatype], st.integers(0, 9))


def bits(array):
    return array.tolist() if array.dtype == object else array.tobytes()


@pytest.mark.parametrize("datatype", [*NUMPY, "BYTES"])
@given(data=st.data())
def test_raw_bytes_and_arrays_are_the_same_to_the_bit(datatype, data):
    array = data.draw(tensors(datatype))
    assert bits(from_bytes(to_bytes(array, datatype), datatype, len(array), "input")) == bits(array)


@pytest.mark.parametrize("datatype", [*IN_JSON, "BYTES"])
@given(data=st.data())
def test_json_and_arrays_are_the_same(datatype, data):
    array = data.draw(tensors(datatype))
    again = from_list(to_list(array, datatype, "output"), datatype, 1, "input")
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_json_has_no_form_for_half_floats(datatype):
    with pytest.raises(RequestError, match="send it in binary"):
        from_list([1.0], datatype, 1, "input 'X'")
    with pytest.raises(RequestError, match="ask for it in binary"):
        to_list(np.ones(1, NUMPY[datatype]), datatype, "output 'Y'")


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("BOOL", [1], "an element is int, not true or false"),
        ("UINT8", [256], "outside the range of UINT8"),
        ("UINT64", [-1], "outside the range of UINT64"),
        ("INT32", [1.5], "an element is float, not an integer"),
        ("FP64", ["1"], "an element is str, not a number"),
        ("FP32", [True], "an element is bool, not a number"),
        ("FP32", [None], "an element is NoneType, not a number"),
    ],
)
def test_an_element_of_another_kind_is_refused(datatype, data, message):
    with pytest.raises(RequestError, match=message):
        from_list(data, datatype, 1, "input 'X'")


@pytest.mark.parametrize("datatype", list(NUMPY))
def test_raw_bytes_of_another_length_are_refused(datatype):
    data = to_bytes(np.ones(3, NUMPY[datatype]), datatype)
    with pytest.raises(RequestError, match=f"has {len(data)} bytes, but 2 elements of {datatype} need"):
        from_bytes(data, datatype, 2, "input 'X'")
