"""Open Inference Protocol v2 over HTTP (JSON and binary tensors), a plain text route and Prometheus metrics."""

from __future__ import annotations

import gzip
import traceback
import zlib
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from export.serving.protocol import Given, RequestError, Wanted, to_json
from export.serving.scheduler import ServedModel
from export.serving.service import Service
from export.serving.tensors import to_bytes, to_list
from export.serving.triton import VERSION

MAX_BODY = 16 * 2**20
"""Bytes of a request, also after decompression: a few thousand of the longest texts."""
WORTH_COMPRESSING = 512
"""Bytes from which a response is compressed for a client that accepts it."""
HEADER_LENGTH = "Inference-Header-Content-Length"


class HttpFrontend:
    """The routes; `app` is the ASGI application."""

    def __init__(self, service: Service) -> None:
        self.service = service
        routes = [
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2", self.server_metadata),
            Route("/v2/models/stats", self.statistics),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/metrics", self.metrics),
            Route("/predict", self.predict, methods=["POST"]),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(prefix, self.model_metadata),
                Route(prefix + "/ready", self.ready),
                Route(prefix + "/config", self.model_config),
                Route(prefix + "/stats", self.statistics),
                Route(prefix + "/infer", self.infer, methods=["POST"]),
            ]
        handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    def _model(self, request: Request) -> ServedModel:
        return self.service.model(request.path_params["model"], request.path_params.get("version", ""))

    async def live(self, request: Request) -> Response:
        """Tells that the process answers."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """Tells whether the server, or one of its models, takes requests: 200 or 503."""
        if request.path_params:
            self._model(request)
        return _json({"ready": self.service.ready}, 200 if self.service.ready else 503)

    async def server_metadata(self, request: Request) -> Response:
        """Answers with the server's metadata."""
        return _json(self.service.metadata())

    async def model_metadata(self, request: Request) -> Response:
        """Answers with a model's metadata."""
        return _json(self._model(request).spec.metadata())

    async def model_config(self, request: Request) -> Response:
        """Answers with a model's configuration."""
        return _json(to_json(self._model(request).spec.config))

    async def statistics(self, request: Request) -> Response:
        """Answers with the statistics of one model, or of all."""
        return _json(self.service.statistics([self._model(request).spec.name] if request.path_params else []))

    async def index(self, request: Request) -> Response:
        """Answers with the repository index."""
        return _json(self.service.index())

    async def metrics(self, request: Request) -> Response:
        """Answers with the Prometheus page."""
        return Response(self.service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predict(self, request: Request) -> Response:
        """Answers texts in plain JSON."""
        columns = list(self.service.inputs.values())
        rows, alone = _rows(await _body(request), request.headers.get("content-type", ""), columns)
        answers = await self.service.predict(rows)
        return _json(answers[0] if alone else answers)

    async def infer(self, request: Request) -> Response:
        """Answers an inference request of the protocol."""
        model = self._model(request)
        head, binary = _split(await _body(request), request.headers.get(HEADER_LENGTH))
        given, wanted, in_binary = _parse(head, binary)
        arrays, wanted = model.spec.read(given), model.spec.wanted(wanted)
        outputs = await self.service.infer(model, arrays)
        answer: dict[str, Any] = {"model_name": model.spec.name, "model_version": VERSION, "outputs": []}
        if head.get("id"):
            answer["id"] = head["id"]
        tail = []
        for item in wanted:
            datatype, array = model.spec.output(item, outputs)
            output: dict[str, Any] = {"name": item.name, "datatype": datatype, "shape": list(array.shape)}
            if in_binary.get(item.name, in_binary[""]):
                tail.append(to_bytes(array, datatype))
                output["parameters"] = {"binary_data_size": len(tail[-1])}
            else:
                output["data"] = to_list(array, datatype, f"output '{item.name}'")
            answer["outputs"].append(output)
        return _compressed(orjson.dumps(answer), tail, request.headers.get("accept-encoding", ""))


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


async def _refused(request: Request, error: Any) -> Response:
    if isinstance(error, RequestError):
        return _json({"error": str(error)}, error.status)
    return _json({"error": f"{request.method} {request.url.path}: {error.detail}"}, error.status_code)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return _json({"error": "internal error; see the server's log"}, 500)


async def _body(request: Request) -> bytes:
    """Reads a request's body and undoes its compression, within MAX_BODY.

    Raises:
        RequestError: 413, too large; 415, an unknown compression; 400, damaged data.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise RequestError(f"Content-Encoding {encoding!r} is not supported: use gzip, deflate or none", 415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RequestError(f"the request is larger than {MAX_BODY:,} bytes", 413)
    if encoding == "identity":
        return bytes(body)
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # finds out itself whether it is gzip or zlib
    try:
        plain = stream.decompress(bytes(body), MAX_BODY + 1)
    except zlib.error as error:
        raise RequestError(f"the {encoding} data of the request is damaged: {error}") from None
    if len(plain) > MAX_BODY:
        raise RequestError(f"the request is larger than {MAX_BODY:,} bytes when it is decompressed", 413)
    if not stream.eof:
        raise RequestError(f"the {encoding} data of the request ends too early")
    return plain


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], bytes]:
    """Splits a request into its JSON object and the binary tensors behind it."""
    size = len(body)
    if length is not None:
        if not length.isascii() or not length.isdigit() or int(length) > len(body):
            raise RequestError(f"{HEADER_LENGTH}: {length} is not a length within the {len(body)} bytes of the request")
        size = int(length)
    return _loads(body[:size], dict), body[size:]


def _loads(data: bytes, *kinds: type) -> Any:
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is not valid JSON: {error}") from None
    if not isinstance(value, kinds):
        names = " or ".join(_KINDS[kind] for kind in kinds)
        raise RequestError(f"the request must be {names}, not {type(value).__name__}")
    return value


def _field(holder: dict[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """Returns one field of a request; null is as good as absent, which is what clients with typed models send."""
    value = holder.get(key)
    value = default if value is None else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RequestError(f"{where}: '{key}' must be {_KINDS[kind]}")
    return value


_KINDS: dict[type, str] = {str: "a string", list: "an array", dict: "an object", int: "an integer", bool: "true or false"}


def _parse(head: dict[str, Any], binary: bytes) -> tuple[list[Given], list[Wanted], dict[str, bool]]:
    """Reads an inference request.

    Returns:
        (inputs, requested outputs, whether each output is wanted in binary; "" for those that do not say).
    """
    given, offset = [], 0
    for item in _field(head, "inputs", list, "request"):
        if not isinstance(item, dict):
            raise RequestError("request: every input must be an object")
        name = _field(item, "name", str, "input")
        where = f"input '{name}'"
        shape = _field(item, "shape", list, where)
        if not all(type(size) is int for size in shape):
            raise RequestError(f"{where}: 'shape' must be integers")
        parameters = _parameters(item, where)
        data: bytes | list[Any]
        if "binary_data_size" in parameters:
            size = _field(parameters, "binary_data_size", int, where)
            if size < 0 or offset + size > len(binary):
                raise RequestError(
                    f"{where}: binary_data_size {size} is more than the {len(binary) - offset} bytes that are left"
                )
            data, offset = binary[offset : offset + size], offset + size
        else:
            data = _field(item, "data", list, where)
        given.append(Given(name, _field(item, "datatype", str, where), shape, data))
    if offset != len(binary):
        raise RequestError(f"{len(binary) - offset} bytes behind the binary tensors belong to none of them")
    wanted = []
    in_binary = {"": _field(_parameters(head, "request"), "binary_data_output", bool, "request", False)}
    for item in _field(head, "outputs", list, "request", []):
        if not isinstance(item, dict):
            raise RequestError("request: every output must be an object")
        name = _field(item, "name", str, "output")
        parameters = _parameters(item, f"output '{name}'")
        wanted.append(Wanted(name, max(0, _field(parameters, "classification", int, f"output '{name}'", 0))))
        in_binary[name] = _field(parameters, "binary_data", bool, f"output '{name}'", in_binary[""])
    return given, wanted, in_binary


def _parameters(holder: dict[str, Any], where: str) -> dict[str, Any]:
    parameters = _field(holder, "parameters", dict, where, {})
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if "shared_memory_region" in parameters:
        raise RequestError(f"{where}: shared memory is not supported: send the tensor in the request")
    return parameters


def _rows(body: bytes, content_type: str, columns: list[str]) -> tuple[list[dict[str, str]], bool]:
    """Reads the rows of the plain text route; returns (rows, whether it was one row and not a list)."""
    first, alone_is_enough = columns[0], len(columns) == 1
    if content_type.partition(";")[0].strip().lower() == "text/plain":
        try:
            value: Any = body.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"the text is not valid UTF-8: {error}") from None
    else:
        value = _loads(body, dict, list, str)
    if isinstance(value, dict) and isinstance(value.get(first), list):
        lists = [_field(value, column, list, "request") for column in columns]
        if len({len(items) for items in lists}) > 1:
            raise RequestError(f"{' and '.join(map(repr, columns))} have different lengths")
        value = [dict(zip(columns, items, strict=True)) for items in zip(*lists, strict=True)]
    alone = not isinstance(value, list)
    rows = []
    for item in [value] if alone else value:
        row = {first: item} if isinstance(item, str) else item
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            raise RequestError(
                f"a row must be an object with {' and '.join(columns)}" + (", or a string" if alone_is_enough else "")
            )
        rows.append(row)
    return rows, alone


def _compressed(head: bytes, tail: list[bytes], accept: str) -> Response:
    """Puts a response together, compressed when the client asks for it."""
    headers = {"Content-Type": "application/json"}
    if tail:
        headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    body = head + b"".join(tail)
    accepted = [item.partition(";")[0].strip() for item in accept.lower().split(",")]
    for encoding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        if encoding in accepted and len(body) >= WORTH_COMPRESSING:
            return Response(compress(body, 1), headers={**headers, "Content-Encoding": encoding})
    return Response(body, headers=headers)
