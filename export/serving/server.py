"""Serves a bundle: Open Inference Protocol v2 over HTTP and gRPC in one process and one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from export.serving.bundle import Bundle

if TYPE_CHECKING:
    from export.serving.service import Service

DRAIN_SECONDS = 30
"""How long requests that are under way may take after the server was asked to stop."""


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    threads: int | None = None,
    max_queue: int | None = None,
    max_batch: int | None = None,
    batch_delay: float | None = None,
    engine: str | None = None,
) -> None:
    """Serves a bundle until SIGTERM or SIGINT, then answers what is under way and returns.

    Args:
        path: the bundle; its hashes and golden outputs are checked first.
        host: address to listen on.
        http_port, grpc_port: 0 takes a free port.
        threads: of ONNX Runtime; None: one per core.
        max_queue: requests of a model that may wait before more are refused; None: as the bundle's config.pbtxt says.
        max_batch: rows of one batch; None: as the bundle says.
        batch_delay: milliseconds that the first request of a batch waits for others; None: as the bundle says (0: no wait,
            requests that come during a batch make the next one).
        engine: see `Bundle.open`.

    Raises:
        UserError: a port in use, a bundle that is damaged or does not give its golden outputs, no `serve` extra.
    """
    try:
        import export.serving.grpc_frontend
        import export.serving.health
        import export.serving.http_frontend  # noqa: F401
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError where grpcio is missing
        raise UserError(f"serving needs more packages ({error}): pip install 'bothways[serve]'") from None
    with _listen(host, http_port) as listener:
        asyncio.run(_serve(listener, grpc_port, lambda: _load(path, engine, threads, max_queue, max_batch, batch_delay)))


def _load(path: str | Path, engine: str | None, threads: int | None, *batching: Any) -> Service:
    from export.serving.service import Service

    bundle = Bundle.open(path, engine=engine, threads=threads)
    bundle.verify()
    service = Service(bundle, *batching)
    # What is loaded stays: the garbage collector need not look at it again during requests.
    gc.collect()
    gc.freeze()
    return service


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """Takes a port, so that one in use shows before anything is loaded."""
    if not 0 <= port <= 65535:
        raise UserError(f"cannot listen on {host}:{port}: ports are 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}: name an address of this machine") from None
    # asyncio switches Nagle's delay off only where the protocol is given.
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}: choose another address or port") from None
        yield listener


async def _serve(listener: socket.socket, grpc_port: int, load: Callable[[], Service]) -> None:
    import grpc
    import uvicorn
    from grpc_health.v1 import health_pb2_grpc
    from tritonclient.grpc import service_pb2_grpc

    from export.serving.grpc_frontend import GrpcFrontend
    from export.serving.health import HealthFrontend
    from export.serving.http_frontend import MAX_BODY, HttpFrontend

    class HttpServer(uvicorn.Server):
        """uvicorn without its signal handlers: HTTP and gRPC stop together."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    host, http_port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    rpc = grpc.aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_BODY)])
    try:
        # gRPC reports a port in use in several lines of its own; asking first gives one.
        with _listen(host, grpc_port):
            pass
        grpc_port = rpc.add_insecure_port(f"{shown}:{grpc_port}")
        service = load()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcFrontend(service), rpc)
        health_pb2_grpc.add_HealthServicer_to_server(HealthFrontend(service), rpc)
        config = uvicorn.Config(
            HttpFrontend(service).app,
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        http = HttpServer(config)
        async with _until_asked_to_stop(service, http) as asked:
            await rpc.start()
            answering = asyncio.create_task(http.serve(sockets=[listener]))
            print(
                f"serving '{service.bundle.manifest.name}' on http://{shown}:{http_port} and grpc://{shown}:{grpc_port}",
                flush=True,
            )
            await asyncio.wait([answering, asyncio.create_task(asked.wait())], return_when=asyncio.FIRST_COMPLETED)
            service.stopping.set()
            http.should_exit = True
            await asyncio.gather(answering, rpc.stop(DRAIN_SECONDS))
    finally:
        await rpc.stop(0)


@contextlib.asynccontextmanager
async def _until_asked_to_stop(service: Service, http: Any) -> AsyncIterator[asyncio.Event]:
    """Runs the models' queues; the first SIGTERM or SIGINT sets the event, a second one refuses what waits."""
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if asked.is_set():
            for model in service.models.values():
                model.refuse_waiting()
            http.force_exit = True
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    queues = [asyncio.create_task(model.run()) for model in service.models.values()]
    try:
        yield asked
    finally:
        for queue in queues:
            queue.cancel()
        service.executor.shutdown()
