"""The health service of gRPC, asked as Kubernetes and load balancers ask it."""

import signal

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from tests.serving.servers import serving

SERVICES = ["", "inference.GRPCInferenceService", "tiny", "tiny_core"]


@pytest.fixture(scope="module")
def health(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield HealthStub(channel)


@pytest.mark.parametrize("service", SERVICES)
def test_the_server_and_each_model_are_serving(health, service):
    assert health.Check(HealthCheckRequest(service=service), timeout=10).status == HealthCheckResponse.SERVING


def test_a_service_that_does_not_exist_is_not_found_and_watched_as_unknown(health):
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(HealthCheckRequest(service="other"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "the models are tiny, tiny_core" in caught.value.details()
    watch = health.Watch(HealthCheckRequest(service="other"), timeout=10)
    assert next(watch).status == HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_who_watches_hears_of_the_stop_and_does_not_hold_it_back(bundle):
    with serving(bundle) as running, grpc.insecure_channel(running.grpc) as channel:
        watches = [HealthStub(channel).Watch(HealthCheckRequest(service=name), timeout=60) for name in [*SERVICES, "", "other"]]
        first = [next(watch).status for watch in watches]
        assert first == [HealthCheckResponse.SERVING] * 5 + [HealthCheckResponse.SERVICE_UNKNOWN]
        running.process.send_signal(signal.SIGTERM)
        assert [[item.status for item in watch] for watch in watches] == [[HealthCheckResponse.NOT_SERVING]] * 5 + [[]]
        assert running.process.wait(20) == 0
        assert running.process.stderr.read() == ""
