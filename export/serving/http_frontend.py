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

from export.serving.protocol import Given, RequestError, Wanted, to_bytes, to_json, to_list
from export.serving.service import Service

MAX_BODY = 16 * 2**20
"""Bytes of a request, also after decompression: a few thousand of the longest texts."""
WORTH_COMPRESSING = 512
"""Bytes from which a response is compressed for a client that accepts it."""
HEADER_LENGTH = "Inference-Header-Content-Length"


def http_app(service: Service) -> Starlette:
    """Returns the ASGI application."""

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    async def server_metadata(request: Request) -> Response:
        return _json(service.metadata())

    async def model_metadata(request: Request) -> Response:
        return _json(_model(service, request).spec.metadata())

    async def model_ready(request: Request) -> Response:
        _model(service, request)
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    async def model_config(request: Request) -> Response:
        return _json(to_json(_model(service, request).spec.config))

    async def statistics(request: Request) -> Response:
        names = [_model(service, request).spec.name] if "model" in request.path_params else []
        return _json(service.statistics(names))

    async def index(request: Request) -> Response:
        return _json(service.index())

    async def metrics(request: Request) -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def infer(request: Request) -> Response:
        model = _model(service, request)
        head, binary = _split(await _body(request), request.headers.get(HEADER_LENGTH))
        given, wanted, in_binary = _parse(head, binary)
        arrays, wanted = model.spec.read(given), model.spec.wanted(wanted)
        outputs = await service.infer(model, arrays)
        answer: dict[str, Any] = {"model_name": model.spec.name, "model_version": "1", "outputs": []}
        if head.get("id"):
            answer["id"] = head["id"]
        tail = []
        for item in wanted:
            datatype, array = model.spec.output(item, outputs)
            output: dict[str, Any] = {"name": item.name, "datatype": datatype, "shape": list(array.shape)}
            if in_binary.get(item.name, in_binary[""]):
                tail.append(to_bytes(array))
                output["parameters"] = {"binary_data_size": len(tail[-1])}
            else:
                output["data"] = to_list(array)
            answer["outputs"].append(output)
        return _compressed(orjson.dumps(answer), tail, request.headers.get("accept-encoding", ""))

    async def predict(request: Request) -> Response:
        rows, alone = _rows(await _body(request), request.headers.get("content-type", ""), service)
        answers = await service.predict(rows)
        return _json(answers[0] if alone else answers)

    model = "/v2/models/{model}"
    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server_metadata),
        Route("/v2/models/stats", statistics),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/metrics", metrics),
        Route("/predict", predict, methods=["POST"]),
    ]
    for prefix in (model, model + "/versions/{version}"):
        routes += [
            Route(prefix, model_metadata),
            Route(prefix + "/ready", model_ready),
            Route(prefix + "/config", model_config),
            Route(prefix + "/stats", statistics),
            Route(prefix + "/infer", infer, methods=["POST"]),
        ]
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
    return Starlette(routes=routes, exception_handlers=handlers)


def _model(service: Service, request: Request) -> Any:
    return service.model(request.path_params["model"], request.path_params.get("version", ""))


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
    value = holder.get(key, default)
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
    if "shared_memory_region" in parameters:
        raise RequestError(f"{where}: shared memory is not supported: send the tensor in the request")
    return parameters


def _rows(body: bytes, content_type: str, service: Service) -> tuple[list[dict[str, str]], bool]:
    """Reads the rows of the plain text route; returns (rows, whether it was one row and not a list)."""
    pair = "TEXT_PAIR" in service.text.spec.inputs
    columns = ["text", "text_pair"] if pair else ["text"]
    if content_type.partition(";")[0].strip().lower() == "text/plain":
        try:
            value: Any = body.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"the text is not valid UTF-8: {error}") from None
    else:
        value = _loads(body, dict, list, str)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        lists = [_field(value, column, list, "request") for column in columns]
        if len({len(items) for items in lists}) > 1:
            raise RequestError("'text' and 'text_pair' have different lengths")
        value = [dict(zip(columns, items, strict=True)) for items in zip(*lists, strict=True)]
    alone = not isinstance(value, list)
    rows = []
    for item in [value] if alone else value:
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in columns):
            raise RequestError(f"a row must be an object with {' and '.join(columns)}" + ("" if pair else ", or a string"))
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
