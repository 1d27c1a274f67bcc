"""Triton model (python backend): texts in, answers out, by the answering half of the task that lies beside this file.

Rows of a whole batch of requests are answered at once; what runs the graphs are the core models (business logic scripting), so
that Triton batches texts, whatever their lengths. It runs inside Triton and needs only NumPy and `tokenizers` there.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    """The interface that Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the task, what it has to know, and the tokenizer with its truncation and padding."""
        directory = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(directory))  # the answering half, `engine.answers`, lies there
        from engine.answers import answering
        from engine.answers._batches import batched

        about = json.loads((directory / "task.json").read_text(encoding="utf-8"))
        self.graphs = about["graphs"]
        self.answers = answering(about["task"])(about["facts"], Tokenizer.from_file(str(directory / "tokenizer.json")))
        self.run = batched(self.call, about["max_batch"])
        self.inputs = [(name.upper(), name) for name in self.answers.columns]

    def execute(self, requests: list) -> list:
        """Answers a batch of requests; a text that is not UTF-8 fails its own request only."""
        rows: list[dict[str, str]] = []
        parts: list[slice | str] = []
        for request in requests:
            columns = [pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel() for name, _ in self.inputs]
            try:
                decoded = [[text.decode() for text in column] for column in columns]
            except UnicodeDecodeError as error:
                parts.append(f"a text is not valid UTF-8: {error}")
                continue
            parts.append(slice(len(rows), len(rows) + len(decoded[0])))
            rows += [dict(zip((key for _, key in self.inputs), row, strict=True)) for row in zip(*decoded, strict=True)]
        tensors = self.answers.tensors(self.answers.answer(self.run, rows)) if rows else {}
        return [self.respond(part, tensors) for part in parts]

    def call(self, graph: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch through the model of a graph."""
        core = self.graphs[graph]
        response = pb_utils.InferenceRequest(
            model_name=core["model"],
            requested_output_names=core["outputs"],
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(arrays[name])) for name in core["inputs"]],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in core["outputs"]}

    def respond(self, part: slice | str, tensors: dict[str, np.ndarray]) -> "pb_utils.InferenceResponse":
        """Returns the response to one request: its rows of the batch, or its error."""
        if isinstance(part, str):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(part, pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array[part]) for name, array in tensors.items()])
