"""A bundle as a service: the two models of its Triton repository, answered in this process.

Shapes: B rows, L tokens, C classes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, PlatformCollector, ProcessCollector, generate_latest

import engine
from engine.answers import Answer
from engine.answers._batches import batched
from engine.errors import UserError
from export.serving.bundle import Bundle
from export.serving.manifest import read_file
from export.serving.protocol import Arrays, ModelSpec, RequestError
from export.serving.scheduler import ServedModel
from export.serving.triton import VERSION, core_name, input_names

ANSWERS = "_answers"
"""Beside the tensors of the text model: the answers as the task has them, for the plain text route."""
EXTENSIONS = ["classification", "model_configuration", "model_repository", "statistics", "binary_tensor_data"]


class Service:
    """The models of a bundle and what the protocol tells about them.

    Args:
        max_queue, max_batch, batch_delay: replace what the bundle's config.pbtxt says; see `export.serving.server.serve`.

    Raises:
        UserError: `max_batch` is above that of the bundle.
    """

    def __init__(
        self, bundle: Bundle, max_queue: int | None = None, max_batch: int | None = None, batch_delay: float | None = None
    ) -> None:
        largest = bundle.manifest.max_batch
        if max_batch is not None and not 1 <= max_batch <= largest:
            raise UserError(
                f"max_batch={max_batch}: the bundle's engines take 1 to {largest} rows: export with a larger max_batch"
            )
        self.bundle = bundle
        self.stopping = asyncio.Event()
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        name = bundle.manifest.name
        cores = {graph: core_name(name, graph) for graph in bundle.engines}
        specs = {model: self._spec(model, max_batch) for model in (name, *cores.values())}
        batching = specs[name].config.dynamic_batching
        if max_queue is not None:
            batching.default_queue_policy.max_queue_size = max_queue
        if batch_delay is not None:
            batching.max_queue_delay_microseconds = round(batch_delay * 1000)
        waiting = batching.default_queue_policy.max_queue_size
        self.text = ServedModel(specs[name], self._texts, self.executor, waiting)
        self.cores = {
            graph: ServedModel(specs[core], self._graph(graph), self.executor, waiting) for graph, core in cores.items()
        }
        self.models = {model.spec.name: model for model in (self.text, *self.cores.values())}
        self.inputs = input_names(bundle.answers)
        self._run = batched(lambda graph, arrays: self.cores[graph].execute_now(arrays), largest)
        self._vocabulary = bundle.answers.tokenizer.get_vocab_size()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.seconds = Histogram(
            "bothways_request_seconds",
            "Time from a request's arrival to its answer.",
            ["model", "status"],
            registry=self.registry,
        )

    @property
    def ready(self) -> bool:
        """Requests are welcome: the server was not asked to stop."""
        return not self.stopping.is_set()

    def _spec(self, model: str, max_batch: int | None) -> ModelSpec:
        text = read_file(self.bundle.directory, self.bundle.manifest, f"models/{model}/config.pbtxt").decode()
        spec = ModelSpec.parse(text, self.bundle.answers.labels)
        if max_batch is not None:
            spec.config.max_batch_size = max_batch
        return spec

    def model(self, name: str, version: str = "") -> ServedModel:
        """Returns a model.

        Raises:
            RequestError: 404.
        """
        if name not in self.models:
            raise RequestError(f"no model '{name}'; the models are {', '.join(self.models)}", 404)
        if version not in ("", VERSION):
            raise RequestError(f"model '{name}' has no version {version}; it has {VERSION}", 404)
        return self.models[name]

    async def infer(self, model: ServedModel, arrays: Arrays) -> Arrays:
        """Answers one request, and measures it.

        Raises:
            RequestError: the queue is full, or the input is none that the model can take.
        """
        started, status = time.perf_counter(), "500"
        try:
            if model is self.text:
                _require_utf8(arrays)
            outputs = await model.infer(arrays)
            status = "200"
            return outputs
        except RequestError as error:
            status = str(error.status)
            raise
        finally:
            self.seconds.labels(model.spec.name, status).observe(time.perf_counter() - started)

    async def predict(self, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
        """Answers any number of rows, in requests of the text model."""
        answers: list[Answer] = []
        # One request at a time: a long list is no overload, and leaves room for others.
        for start in range(0, len(rows), self.text.spec.max_batch):
            chunk = rows[start : start + self.text.spec.max_batch]
            columns = {name: [row[key].encode() for row in chunk] for name, key in self.inputs.items()}
            arrays = {name: np.array(column, dtype=np.object_)[:, None] for name, column in columns.items()}
            answers += (await self.infer(self.text, arrays))[ANSWERS].tolist()
        return answers

    def _texts(self, arrays: Arrays) -> Arrays:
        columns = [[text.decode() for text in arrays[name].ravel()] for name in self.inputs]
        rows = [dict(zip(self.inputs.values(), row, strict=True)) for row in zip(*columns, strict=True)]
        given = self.bundle.answers.answer(self._run, rows)
        whole = np.empty(len(given), dtype=np.object_)
        whole[:] = given
        return {**self.bundle.answers.tensors(given), ANSWERS: whole}

    def _graph(self, graph: str) -> Callable[[Arrays], Arrays]:
        """Returns what answers requests of a graph's own model."""
        known = self.bundle.engines[graph].inputs

        def compute(arrays: Arrays) -> Arrays:
            given = {name: arrays[name] for name in known}
            self._check(given)
            try:
                return self.bundle.engines[graph].run(given)
            except Exception as error:
                if type(error).__name__ != "InvalidArgument":  # ONNX Runtime: an index outside of a table
                    raise
                raise RequestError(f"the engine refuses these inputs: {str(error).splitlines()[0]}") from None

        return compute

    def _check(self, arrays: Arrays) -> None:
        """Raises RequestError for token inputs that no engine can take."""
        shapes = {array.shape for array in arrays.values() if array.dtype == np.int64}
        longest = self.bundle.manifest.max_length
        if len(shapes) > 1 or not all(1 <= length <= longest for _, length in shapes):
            raise RequestError(f"token inputs must have one shape of 1 to {longest} tokens a row, not {sorted(shapes)}")
        ids_BL = arrays.get("input_ids")
        if ids_BL is not None and (ids_BL.min() < 0 or ids_BL.max() >= self._vocabulary):
            raise RequestError(f"input_ids holds {ids_BL.min()} to {ids_BL.max()}; the vocabulary is 0 to {self._vocabulary - 1}")

    def metadata(self) -> dict[str, Any]:
        """Returns the server metadata of the protocol."""
        return {"name": "bothways", "version": engine.__version__, "extensions": EXTENSIONS}

    def statistics(self, names: list[str]) -> dict[str, Any]:
        """Returns the statistics of the models, of all without `names`."""
        return {"model_stats": [self.models[name].statistics.as_json(name) for name in names or self.models]}

    def index(self) -> list[dict[str, str]]:
        """Returns the repository index of the protocol."""
        return [{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in self.models]

    def metrics(self) -> bytes:
        """Returns the Prometheus page: Triton's counters by their names, latency and the process."""
        lines = []
        for name, help_text, kind, value in _TRITON_METRICS:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
            lines += [f'{name}{{model="{model}",version="{VERSION}"}} {value(served)}' for model, served in self.models.items()]
        return "".join(f"{line}\n" for line in lines).encode() + generate_latest(self.registry)


def _require_utf8(arrays: Arrays) -> None:
    for name, array in arrays.items():
        for text in array.ravel():
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise RequestError(f"input '{name}' holds a text that is not valid UTF-8: {error}") from None


def _request(key: str, attribute: str = "ns", unit: int = 1000) -> Any:
    return lambda model: getattr(model.statistics.requests[key], attribute) // unit


_TRITON_METRICS = [
    ("nv_inference_request_success", "Requests that were answered.", "counter", _request("success", "count", 1)),
    ("nv_inference_request_failure", "Requests that failed.", "counter", _request("fail", "count", 1)),
    ("nv_inference_count", "Rows that were inferred.", "counter", lambda model: model.statistics.inferences),
    ("nv_inference_exec_count", "Batches that were executed.", "counter", lambda model: model.statistics.executions),
    ("nv_inference_request_duration_us", "Time of answered requests.", "counter", _request("success")),
    ("nv_inference_queue_duration_us", "Time in the queue.", "counter", _request("queue")),
    ("nv_inference_compute_input_duration_us", "Time gathering inputs.", "counter", _request("compute_input")),
    ("nv_inference_compute_infer_duration_us", "Time computing.", "counter", _request("compute_infer")),
    ("nv_inference_compute_output_duration_us", "Time splitting outputs.", "counter", _request("compute_output")),
    ("nv_inference_pending_request_count", "Requests that wait.", "gauge", lambda model: len(model.queue)),
]
