"""Every datatype through gRPC, as raw bytes and as typed contents: our server answers what the real tritonserver answers."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from export.serving.grpc_frontend import GrpcFrontend
from export.serving.protocol import ModelSpec
from export.serving.tensors import NUMPY, to_bytes
from tests.serving.triton_server import triton, why_not

CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 4
input [ {{ name: "IN" data_type: TYPE_{kind} dims: [ -1 ] }} ]
output [ {{ name: "OUT" data_type: TYPE_{kind} dims: [ -1 ] }} ]
"""
ECHO = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        given = [pb_utils.get_input_tensor_by_name(request, "IN") for request in requests]
        echoed = [{echo} for item in given]
        return [pb_utils.InferenceResponse([item]) for item in echoed]
"""
BY_NUMPY, BY_DLPACK = 'pb_utils.Tensor("OUT", item.as_numpy())', 'pb_utils.Tensor.from_dlpack("OUT", item.to_dlpack())'
"""How Triton's python backend copies a tensor; its NumPy has no BF16."""
DATATYPES = [*NUMPY, "BYTES"]
TYPED = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def values_of(datatype):
    """Returns six values, the extremes among them."""
    if datatype == "BYTES":
        return [b"", b"bad", "schön".encode(), b"\x00\xff", b"a" * 300, b" "]
    if datatype == "BOOL":
        return [True, False, False, True, True, False]
    if "INT" in datatype:
        limits = np.iinfo(NUMPY[datatype])
        return [limits.min, limits.max, 0, 1, 2, 100]
    return [0.0, -1.5, 2.0, float("inf"), 0.25, 96.0]


def array_of(datatype):
    return np.array(values_of(datatype), dtype=NUMPY.get(datatype, object)).reshape(2, 3)


def request(datatype, shape=(2, 3), **contents):
    """Returns a request with raw bytes, or with the typed contents that are given."""
    made = service_pb2.ModelInferRequest(model_name=f"echo_{datatype.lower()}", id="seven")
    tensor = made.inputs.add(name="IN", datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    if not contents:
        made.raw_input_contents.append(to_bytes(array_of(datatype), datatype))
    return made


@contextlib.contextmanager
def answering(service):
    """Runs our gRPC front end beside the test; yields its address."""
    ready, loop, asked, ports = threading.Event(), asyncio.new_event_loop(), asyncio.Event(), []

    async def run():
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcFrontend(service), server)
        ports.append(server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        ready.set()
        await asked.wait()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(asked.set)
        thread.join()
        loop.close()


class Echo:
    """A service of one model for each datatype that gives back what it got."""

    def __init__(self):
        specs = [ModelSpec.parse(config_of(datatype), []) for datatype in DATATYPES]
        self.models = {spec.name: SimpleNamespace(spec=spec) for spec in specs}

    def model(self, name, version):
        return self.models[name]

    async def infer(self, model, arrays):
        return {"OUT": arrays["IN"]}


def config_of(datatype):
    return CONFIG.format(name=f"echo_{datatype.lower()}", kind="STRING" if datatype == "BYTES" else datatype)


@pytest.fixture(scope="module")
def ours():
    with answering(Echo()) as address, grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def tritons(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    work = tmp_path_factory.mktemp("echo")
    for datatype in DATATYPES:
        directory = work / "repository" / f"echo_{datatype.lower()}"
        (directory / "1").mkdir(parents=True)
        (directory / "config.pbtxt").write_text(config_of(datatype))
        (directory / "1" / "model.py").write_text(ECHO.format(echo=BY_DLPACK if datatype == "BF16" else BY_NUMPY))
    with triton(work / "repository", work) as (_, address), grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def answer(stub, sent):
    """Returns (status, outputs and id) of a request."""
    try:
        got = stub.ModelInfer(sent, timeout=20)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    outputs = [(item.name, item.datatype, list(item.shape)) for item in got.outputs]
    return "OK", (outputs, list(got.raw_output_contents), got.id)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_and_typed_contents_of_every_datatype_come_back_to_the_bit(ours, datatype):
    expected = "OK", ([("OUT", datatype, [2, 3])], [to_bytes(array_of(datatype), datatype)], "seven")
    assert answer(ours, request(datatype)) == expected
    if datatype in TYPED:
        assert answer(ours, request(datatype, **{TYPED[datatype]: values_of(datatype)})) == expected


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_is_answered_as_tritonserver_answers_it(ours, tritons, datatype):
    sent = [request(datatype)]
    sent += [request(datatype, **{TYPED[datatype]: values_of(datatype)})] if datatype in TYPED else []
    for item in sent:
        assert answer(ours, item)[0] == "OK"
        assert answer(ours, item) == answer(tritons, item)


def both(datatype):
    made = request(datatype)
    made.inputs[0].contents.int64_contents.extend([1] * 6)
    return made


REFUSED = {
    "contents of another datatype": (request("INT64", int_contents=[1] * 6), "int_contents does not hold INT64: use int64"),
    "contents of a datatype without a field": (
        request("FP16", fp32_contents=[1] * 6),
        "does not hold FP16: use raw_input_contents",
    ),
    "too few elements": (request("FP32", fp32_contents=[1] * 5), "has 5 elements, but shape [2, 3] needs 6"),
    "contents and raw bytes": (both("INT64"), "give contents or raw_input_contents, not both"),
    "two kinds of contents": (
        request("INT64", int64_contents=[1] * 6, bool_contents=[True]),
        "bool_contents does not hold INT64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contents_that_do_not_fit_are_refused_in_one_line(ours, case):
    status, message = answer(ours, REFUSED[case][0])
    assert (status, REFUSED[case][1] in message, "\n" in message) == ("INVALID_ARGUMENT", True, False), message


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_by_tritonserver_too(tritons, case):
    assert answer(tritons, REFUSED[case][0])[0] == "INVALID_ARGUMENT"


def test_an_element_outside_of_its_datatype_is_refused_where_tritonserver_cuts_it_off(ours):
    for datatype, values in (("INT8", [128]), ("UINT16", [65536]), ("INT16", [-32769])):
        status, message = answer(ours, request(datatype, (1, 1), **{TYPED[datatype]: values}))
        assert (status, "outside the range" in message) == ("INVALID_ARGUMENT", True), message
