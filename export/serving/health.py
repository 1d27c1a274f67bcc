"""The health service of gRPC (grpc.health.v1), which Kubernetes probes and load balancers ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from export.serving.service import Service

SERVER = ("", "inference.GRPCInferenceService")
"""Names of the server as a whole; each model is a service by its own name beside them."""


class HealthFrontend(health_pb2_grpc.HealthServicer):
    """The servicer. A Watch ends when the server stops: an open one would hold the server back."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's names
        status = self._status(request.service)
        if status == HealthCheckResponse.SERVICE_UNKNOWN:
            known = ", ".join(self.service.models)
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"no service '{request.service}'; the models are {known}, '' is the server"
            )
        return HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield HealthCheckResponse(status=self._status(request.service))
        await self.service.stopping.wait()
        if self._status(request.service) != HealthCheckResponse.SERVICE_UNKNOWN:
            yield HealthCheckResponse(status=self._status(request.service))

    def _status(self, name: str) -> Any:
        if name not in SERVER and name not in self.service.models:
            return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if self.service.ready else HealthCheckResponse.NOT_SERVING
