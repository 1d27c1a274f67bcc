"""A real server process and the official clients for it."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

grpc_client = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc,http] is not installed")
http_client = pytest.importorskip("tritonclient.http", reason="tritonclient[grpc,http] is not installed")

CLIENTS = {"http": http_client, "grpc": grpc_client}
START_SECONDS = 60


class Server:
    """A running server."""

    def __init__(self, process, http, grpc):
        self.process, self.http, self.grpc = process, http, grpc

    def client(self, kind, concurrency=16):
        """Opens an official client."""
        if kind == "grpc":
            return grpc_client.InferenceServerClient(self.grpc)
        return http_client.InferenceServerClient(self.http, concurrency=concurrency)

    def request(self, method, path, body=None, headers=None):
        """Sends one HTTP request as it is; returns (status, body)."""
        with contextlib.closing(http.client.HTTPConnection(self.http, timeout=30)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def json(self, method, path, value=None, headers=None):
        """Sends one HTTP request of JSON; returns (status, decoded answer)."""
        status, body = self.request(method, path, None if value is None else json.dumps(value), headers)
        return status, json.loads(body)

    def stop(self):
        """Asks the server to stop; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start(bundle, **options):
    """Starts a server process on free ports."""
    code = "import json, sys; from export.serving.server import serve; serve(sys.argv[1], **json.loads(sys.argv[2]))"
    options = json.dumps({"http_port": 0, "grpc_port": 0, "threads": 1, **options})
    command = [sys.executable, "-c", code, str(bundle), options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def serving(bundle, **options):
    """Runs a server until the block ends."""
    process = start(bundle, **options)
    try:
        line = process.stdout.readline()
        found = re.search(r"on http://(\S+) and grpc://(\S+)", line)
        assert found, f"{line}{process.communicate()[1]}"
        yield Server(process, *found.groups())
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def inputs(kind, arrays, binary=True):
    """Returns the client's inputs for arrays by name; int64, float32 or object arrays of bytes."""
    made = []
    for name, array in arrays.items():
        datatype = {"i": "INT64", "f": "FP32", "O": "BYTES"}[array.dtype.kind]
        item = CLIENTS[kind].InferInput(name, list(array.shape), datatype)
        item.set_data_from_numpy(array, **({"binary_data": binary} if kind == "http" else {}))
        made.append(item)
    return made


def texts(*values):
    """Returns the TEXT input of these strings."""
    return {"TEXT": np.array([[value.encode()] for value in values], dtype=np.object_)}
