"""Triton model (python backend): texts in, labels and scores out.

It tokenizes every text of a batch of requests at once and asks the token model for their logits (business logic scripting), so
that Triton batches texts, whatever their lengths. It runs inside Triton and needs only NumPy and `tokenizers` there.

Shapes: B texts of all requests, L tokens, C classes.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    """The interface that Triton's python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the tokenizer, with its truncation and padding, and the labels that lie beside this file."""
        config = json.loads(args["model_config"])
        directory = Path(args["model_repository"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.core, self.inputs = parameters["core"], parameters["core_inputs"].split()
        self.texts = [item["name"] for item in config["input"]]
        self.tokenizer = Tokenizer.from_file(str(directory / args["model_version"] / "tokenizer.json"))
        labels = (directory / "labels.txt").read_text(encoding="utf-8").splitlines()
        self.labels = np.array([label.encode() for label in labels], dtype=np.object_)

    def execute(self, requests: list) -> list:
        """Answers a batch of requests; a text that is not UTF-8 fails its own request only."""
        rows: list[str | tuple[str, ...]] = []
        parts: list[slice | str] = []
        for request in requests:
            columns = [pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel() for name in self.texts]
            try:
                decoded = [[text.decode() for text in column] for column in columns]
            except UnicodeDecodeError as error:
                parts.append(f"a text is not valid UTF-8: {error}")
                continue
            parts.append(slice(len(rows), len(rows) + len(decoded[0])))
            rows += decoded[0] if len(decoded) == 1 else list(zip(*decoded, strict=True))
        scores_BC = softmax(self.logits(rows)) if rows else np.empty((0, len(self.labels)))
        return [self.answer(part, scores_BC) for part in parts]

    def logits(self, rows: list) -> np.ndarray:
        """Returns the token model's logits, shape (B, C)."""
        encoded = self.tokenizer.encode_batch(rows)
        arrays_BL = {
            "input_ids": [row.ids for row in encoded],
            "attention_mask": [row.attention_mask for row in encoded],
            "token_type_ids": [row.type_ids for row in encoded],
        }
        response = pb_utils.InferenceRequest(
            model_name=self.core,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor(name, np.array(arrays_BL[name], dtype=np.int64)) for name in self.inputs],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()

    def answer(self, part: slice | str, scores_BC: np.ndarray) -> "pb_utils.InferenceResponse":
        """Returns the response to one request: its rows of the batch, or its error."""
        if isinstance(part, str):
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(part, pb_utils.TritonError.INVALID_ARG))
        scores = scores_BC[part]
        labels = self.labels[scores.argmax(axis=1)][:, None]
        return pb_utils.InferenceResponse([pb_utils.Tensor("LABEL", labels), pb_utils.Tensor("SCORES", scores)])


def softmax(logits_BC: np.ndarray) -> np.ndarray:
    """Returns float32 probabilities, shape (B, C)."""
    exponentials = np.exp(logits_BC - logits_BC.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
