"""A python-based Triton backend that runs ONNX files: stands in for `onnxruntime` and `tensorrt` where Triton lacks them.

Like the real backends it refuses a configuration whose inputs or outputs are not those of the model.
"""

import json
import os

import onnxruntime
import triton_python_backend_utils as pb_utils

FILES = {"onnxruntime_onnx": "model.onnx", "tensorrt_plan": "model.plan"}


class TritonPythonModel:
    """One model of this backend."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], FILES[config["platform"]])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for kind, nodes in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            configured, known = {item["name"] for item in config[kind]}, {node.name for node in nodes}
            if not configured <= known:
                raise pb_utils.TritonModelException(
                    f"unexpected {kind} {sorted(configured - known)}, the model has {sorted(known)}"
                )
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.outputs = [item["name"] for item in config["output"]]

    def execute(self, requests):
        responses = []
        for request in requests:
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            results = self.session.run(self.outputs, feed)
            tensors = [pb_utils.Tensor(name, array) for name, array in zip(self.outputs, results, strict=True)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
