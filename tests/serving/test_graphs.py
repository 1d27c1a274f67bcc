"""A bundle of two graphs: the second reads what the first gives; here, in the server and in tritonserver."""

import asyncio
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import engine.answers
from engine.answers._texts import TextAnswers
from export.serving.bundle import Bundle, verify_bundle
from export.serving.service import Service
from export.serving.write import write_bundle
from tests.serving.servers import CLIENTS, inputs, texts
from tests.serving.triton_server import triton, why_not
from tests.unit.models import tiny_tokenizer

ANSWERS = '''
from engine.answers import Metric
from engine.answers._texts import TextAnswers


class Answers(TextAnswers):
    """The sum of a text's token ids: an encoder gives them as numbers, a decoder adds them up."""

    metric = Metric("error")

    def answer(self, run, rows):
        arrays = self.prepare(rows)
        states = run("encoder", arrays)["states"]
        totals = run("decoder", {"states": states, "attention_mask": arrays["attention_mask"]})["total"]
        return [{"total": float(total)} for (total,) in totals]

    def metrics(self, answers, rows):
        return {"error": 0.0, "examples": len(rows)}

    def record(self, answer, row):
        return answer
'''


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def save(path, nodes, takes, gives, constants=()):
    graph = helper.make_graph(nodes, path.stem, takes, gives, initializer=list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def make_graphs(work):
    axis = onnx.numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")
    last = onnx.numpy_helper.from_array(np.array([2], dtype=np.int64), "last")
    mask, states = value("attention_mask", TensorProto.INT64, "length"), value("states", TensorProto.FLOAT, "length", 1)
    encoder = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["kept"]),
        helper.make_node("Cast", ["kept"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["numbers", "last"], ["states"]),
    ]
    decoder = [
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["column"]),
        helper.make_node("Mul", ["states", "column"], ["products"]),
        helper.make_node("ReduceSum", ["products", "axis"], ["total"], keepdims=0),
    ]
    ids = value("input_ids", TensorProto.INT64, "length")
    total = value("total", TensorProto.FLOAT, 1)
    return {
        "encoder": {"onnxruntime": save(work / "encoder.onnx", encoder, [ids, mask], [states], [last])},
        "decoder": {"onnxruntime": save(work / "decoder.onnx", decoder, [states, mask], [total], [axis, last])},
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle; its answering half is a file that the registry knows."""
    work = tmp_path_factory.mktemp("graphs")
    (work / "sums.py").write_text(ANSWERS)
    space = {"__name__": "sums"}
    exec(compile(ANSWERS, str(work / "sums.py"), "exec"), space)
    patch = pytest.MonkeyPatch()
    patch.setattr("export.serving.bundle.answering", lambda task: space["Answers"])
    patch.setattr("inspect.getfile", lambda kind: str(work / "sums.py"))
    tiny_tokenizer(work / "tokenizer").save_pretrained(work / "tokenizer")
    engines = make_graphs(work)

    def reference(graph, arrays):
        if graph == "encoder":
            return {"states": (arrays["input_ids"] * arrays["attention_mask"])[..., None].astype(np.float32)}
        return {"total": (arrays["states"] * arrays["attention_mask"][..., None]).sum(axis=1)}

    (work / "bundle").mkdir()
    write_bundle(
        work / "bundle",
        name="sums",
        task="sums",
        facts={"text": "text"},
        max_length=16,
        max_batch=2,
        tokenizer=work / "tokenizer",
        engines=engines,
        golden=[{"text": text} for text in ("a good film", "bad", "the plot was very very dull")],
        reference=reference,
        parity={},
        benchmark={},
        provenance={},
    )
    yield work / "bundle"
    patch.undo()


ROWS = [{"text": text} for text in ("a good film", "bad", "the plot was very very dull", "great", "a long story")]


def test_both_graphs_are_named_typed_verified_and_answer_in_batches(bundle):
    report = verify_bundle(bundle)
    assert set(report["measured"]["outputs"]) == {"encoder/states", "decoder/total"}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [tensor["shape"] for tensor in manifest["graphs"]["encoder"]["outputs"]] == [["batch", "length", 1]]
    opened = Bundle.open(bundle)
    assert opened.predict(ROWS) == [opened.predict([row])[0] for row in ROWS]
    assert isinstance(opened.answers, TextAnswers)


def test_the_server_runs_both(bundle):
    opened = Bundle.open(bundle)

    async def ask():
        service = Service(opened)
        queues = [asyncio.create_task(model.run()) for model in service.models.values()]
        try:
            return sorted(service.models), await service.predict(ROWS)
        finally:
            for queue in queues:
                queue.cancel()
            service.executor.shutdown()

    assert asyncio.run(ask()) == (["sums", "sums_decoder", "sums_encoder"], opened.predict(ROWS))


def test_tritonserver_runs_both(bundle, tmp_path):
    if why_not():
        pytest.skip(why_not())
    assert "sums" not in engine.answers.own()
    with triton(bundle / "models", tmp_path) as (http, _):
        given = CLIENTS["http"].InferenceServerClient(http).infer("sums", inputs("http", texts("a good film", "bad")))
        answers = [json.loads(text) for text in given.as_numpy("ANSWER")[:, 0]]
    assert answers == Bundle.open(bundle).predict(ROWS[:2])
