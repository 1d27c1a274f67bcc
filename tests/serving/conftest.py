"""One bundle and one server for all serving tests."""

import pytest

from export.serving.bundle import Bundle
from tests.serving.servers import serving
from tests.unit.bundles import shared_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return shared_bundle(tmp_path_factory)


@pytest.fixture(scope="session")
def opened(bundle):
    return Bundle.open(bundle)


@pytest.fixture(scope="session")
def server(bundle):
    with serving(bundle) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def kind(request):
    return request.param


@pytest.fixture
def client(server, kind):
    opened = server.client(kind)
    yield opened
    opened.close()
