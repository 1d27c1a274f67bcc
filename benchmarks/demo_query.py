"""The last step of `make demo`: serves the bundle, asks it one question through the official Triton client, sums the run up."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import USER_ERROR, UserError
from engine.terminal import printing
from export.report.figures import Run, judged, read_run
from export.report.page import write_report

QUESTION = "a warm , funny and beautifully acted film that stays with you"
START_SECONDS = 120
"""Longest wait for the server to be ready."""


def free_ports(count: int) -> list[int]:
    """Returns ports of the loopback interface that nothing listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def served(command: list[str], ready: Any) -> Iterator[None]:
    """Runs a server until the block ends.

    Args:
        command: its command line.
        ready: says whether it answers.

    Raises:
        UserError: it ended, or was not ready in time; with the last line that it wrote.
    """
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not ready():
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = (log.read().strip().splitlines() or ["it said nothing"])[-1]
                    what = "was not ready in time" if server.poll() is None else f"ended with status {server.returncode}"
                    raise UserError(f"`{' '.join(command)}` {what}: {said}")
                time.sleep(0.2)
            yield
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(client: Any, module: Any, model: str, text: str) -> tuple[str, list[float]]:
    """Returns (label, scores) for one text, through tritonclient's `http` or `grpc` module."""
    import numpy as np

    tensor = module.InferInput("TEXT", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    answer = client.infer(model, [tensor])
    label, scores = answer.as_numpy("LABEL").reshape(-1)[0], answer.as_numpy("SCORES").reshape(-1)
    return label.decode() if isinstance(label, bytes) else str(label), [float(score) for score in scores]


def query(bundle: Path, text: str) -> dict[str, tuple[str, list[float]]]:
    """Serves the bundle and returns {"HTTP" | "gRPC": (label, scores)} of one text."""
    import tritonclient.grpc
    import tritonclient.http

    model = json.loads((bundle / "manifest.json").read_text())["name"]
    http_port, grpc_port = free_ports(2)
    command = [str(Path(sys.executable).with_name("bothways")), "serve", str(bundle), "--host", "127.0.0.1"]
    command += ["--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    with (
        tritonclient.http.InferenceServerClient(f"127.0.0.1:{http_port}") as http,
        tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as grpc,
    ):

        def ready() -> bool:
            # The client raises errors of its transport while nothing listens yet.
            with contextlib.suppress(Exception):
                return http.is_model_ready(model) and grpc.is_model_ready(model)
            return False

        with served(command, ready):
            return {"HTTP": ask(http, tritonclient.http, model, text), "gRPC": ask(grpc, tritonclient.grpc, model, text)}


def summary(run: Run) -> Any:
    """Returns a table of the baseline beside the engine."""
    from rich.table import Table

    final = run.final
    assert final is not None
    comparison = final.get("comparison") or {}
    columns = [name for name in (comparison.get("baseline"), final["stage"]) if name]
    table = Table("", *columns, title=f"{final['recipe']}: what the chain made")
    records = [run.stages[name] for name in columns]
    scores = [score.interval if (score := judged(record)) else None for record in records]
    table.add_row("accuracy, %", *(f"{a.value:.1f} ({a.low:.1f} to {a.high:.1f})" if a else "" for a in scores))
    table.add_row("parameters, M", *(f"{record['parameters'] / 1e6:.1f}" for record in records))
    table.add_row("weights, MB", *(f"{record['weight_bytes'] / 1e6:.1f}" for record in records))
    measured = run.measurements()
    forms = {"PyTorch fp32": "torch-fp32", "ONNX Runtime fp32": "onnx-fp32", "engine": "engine"}
    for title, form in forms.items():
        times = [measured.get(f"{name}/{form}") for name in columns]
        if any(times):
            table.add_row(f"batch 1, ms: {title}", *(f"{entry['median_ms']:.2f}" if entry else "" for entry in times))
    for key, title in {
        "accuracy_drop_points": "drop of accuracy, points",
        "speedup_vs_torch_fp32": "speed-up over PyTorch fp32",
        "speedup_vs_onnx_fp32": "speed-up over ONNX Runtime fp32",
    }.items():
        entry = comparison.get(key)
        if entry:
            blank = [""] * (len(columns) - 1)
            table.add_row(title, *blank, f"{entry['value']:.1f} ({entry['low']:.1f} to {entry['high']:.1f})")
    return table


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.demo_query RUN`."""
    from rich.console import Console

    parser = argparse.ArgumentParser("python -m benchmarks.demo_query", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run, as runs/demo")
    parser.add_argument("--text", default=QUESTION, help="the question")
    chosen = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        run = read_run(chosen.run)
        if run.final is None:
            raise UserError(f"{chosen.run}: no finished export stage: `bothways run` its recipe to the end")
        report = write_report(chosen.run)
        answers = query(chosen.run / run.final["stage"], chosen.text)
        console.print(f"“{chosen.text}”", markup=False)
        for protocol, (label, scores) in answers.items():
            console.print(f"  {protocol}: {label}  {[round(score, 4) for score in scores]}", markup=False)
        console.print(summary(run))
        console.print(f"report: {report}", markup=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    with printing(outlive_reader=True):
        main()
