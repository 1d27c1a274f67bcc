"""The server as a process: what stops it from starting, and how it stops."""

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import UserError
from export.serving.server import _listen, serve
from tests.serving.servers import inputs, serving, texts
from tests.unit.bundles import copy_bundle, relist


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("which", ["http_port", "grpc_port"])
def test_a_port_in_use_is_one_line_before_the_bundle_is_read(tmp_path, taken, which, capfd):
    ports = {"http_port": 0, "grpc_port": 0, which: taken}
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{taken}: Address already in use") as caught:
        serve(tmp_path / "no bundle", **ports)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("192.0.2.1", 0)])
def test_an_address_that_is_not_this_machines_is_one_line(tmp_path, host, port):
    with pytest.raises(UserError, match="cannot listen on"):
        serve(tmp_path, host, http_port=port, grpc_port=0)


def test_the_listener_names_its_protocol_so_that_asyncio_switches_nagles_delay_off():
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_changed_bundle_is_not_served(bundle, tmp_path):
    copy = copy_bundle(bundle, tmp_path / "copy")
    labels = copy / "models/tiny/labels.txt"
    labels.write_text(labels.read_text().replace("negative", "positive"))
    with pytest.raises(UserError, match=r"models/tiny/labels\.txt"):
        serve(copy, http_port=0, grpc_port=0)


def test_a_bundle_whose_golden_outputs_do_not_match_is_not_served(bundle, tmp_path):
    copy = copy_bundle(bundle, tmp_path / "copy")
    golden = copy / "golden.jsonl"
    golden.write_text(golden.read_text().replace('"model/logits": [', '"model/logits": [9', 1))
    relist(copy)
    with pytest.raises(UserError, match="differs from its golden values"):
        serve(copy, http_port=0, grpc_port=0)


def test_a_batch_beyond_the_engines_is_not_served(bundle):
    with pytest.raises(UserError, match="max_batch=5: the bundle's engines take 1 to 4 rows"):
        serve(bundle, http_port=0, grpc_port=0, max_batch=5)


def one_request_waits(running, kind, pool):
    """Sends a request to a server that waits for more of them; returns its future when it is in the queue."""
    under_way = pool.submit(running.client(kind).infer, "tiny", inputs(kind, texts("bad")))
    while b'nv_inference_pending_request_count{model="tiny",version="1"} 1' not in running.request("GET", "/metrics")[1]:
        assert not under_way.done()
    return under_way


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_sigterm_lets_requests_under_way_finish_and_exits_with_success(bundle, kind):
    with serving(bundle, batch_delay=2000) as running, ThreadPoolExecutor(1) as pool:
        under_way = one_request_waits(running, kind, pool)
        assert running.stop() == 0
        assert under_way.result().as_numpy("SCORES").shape == (1, 3)
        assert running.process.stderr.read() == ""
    with pytest.raises(ConnectionError):
        running.request("GET", "/v2/health/live")


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_a_second_sigterm_refuses_what_waits_and_exits_with_success(bundle, kind):
    with serving(bundle, batch_delay=3_600_000) as running, ThreadPoolExecutor(1) as pool:
        under_way = one_request_waits(running, kind, pool)
        running.process.send_signal(signal.SIGTERM)
        while not under_way.done():
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert "the server stops" in str(under_way.exception())
        assert running.process.wait(30) == 0
        assert running.process.stderr.read() == ""
