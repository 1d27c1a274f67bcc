"""Open Inference Protocol v2 over gRPC."""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2, service_pb2_grpc

from export.serving.protocol import Given, RequestError, Wanted
from export.serving.service import Service
from export.serving.tensors import to_bytes
from export.serving.triton import VERSION

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    503: grpc.StatusCode.UNAVAILABLE,
}


class GrpcFrontend(service_pb2_grpc.GRPCInferenceServiceServicer):
    """The servicer; what it does not define (loading models, shared memory) answers UNIMPLEMENTED."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's names
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.service.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        known = request.name in self.service.models and request.version in ("", VERSION)
        return service_pb2.ModelReadyResponse(ready=known and self.service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return ParseDict(self.service.metadata(), service_pb2.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = await self._model(request.name, request.version, context)
        return ParseDict(model.spec.metadata(), service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = await self._model(request.name, request.version, context)
        return service_pb2.ModelConfigResponse(config=model.spec.config)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        names = [(await self._model(request.name, request.version, context)).spec.name] if request.name else []
        return ParseDict(self.service.statistics(names), service_pb2.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        return ParseDict({"models": self.service.index()}, service_pb2.RepositoryIndexResponse())

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            return await self._infer(request)
        except RequestError as error:
            await context.abort(_CODES[error.status], str(error))
        except Exception as error:
            traceback.print_exception(error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for request in requests:
            try:
                yield service_pb2.ModelStreamInferResponse(infer_response=await self._infer(request))
            except RequestError as error:
                answer = service_pb2.ModelInferResponse(id=request.id)
                yield service_pb2.ModelStreamInferResponse(error_message=str(error), infer_response=answer)

    async def _model(self, name: str, version: str, context: Any) -> Any:
        try:
            return self.service.model(name, version)
        except RequestError as error:
            await context.abort(_CODES[error.status], str(error))

    async def _infer(self, request: Any) -> Any:
        model = self.service.model(request.model_name, request.model_version)
        arrays = model.spec.read(_given(request))
        wanted = model.spec.wanted([_wanted(item) for item in request.outputs])
        outputs = await self.service.infer(model, arrays)
        response = service_pb2.ModelInferResponse(model_name=model.spec.name, model_version=VERSION, id=request.id)
        for item in wanted:
            datatype, array = model.spec.output(item, outputs)
            response.outputs.add(name=item.name, datatype=datatype, shape=array.shape)
            response.raw_output_contents.append(to_bytes(array, datatype))
        return response


def _given(request: Any) -> list[Given]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    given = []
    for index, item in enumerate(request.inputs):
        if "shared_memory_region" in item.parameters:
            raise RequestError(f"input '{item.name}': shared memory is not supported: send the tensor in the request")
        if raw and item.HasField("contents"):
            raise RequestError(f"input '{item.name}': give contents or raw_input_contents, not both")
        given.append(Given(item.name, item.datatype, list(item.shape), raw[index] if raw else item.contents))
    return given


def _wanted(item: Any) -> Wanted:
    if "shared_memory_region" in item.parameters:
        raise RequestError(f"output '{item.name}': shared memory is not supported")
    return Wanted(item.name, max(0, item.parameters["classification"].int64_param if "classification" in item.parameters else 0))
