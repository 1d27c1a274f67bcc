"""Open Inference Protocol v2, judged by the official tritonclient over HTTP and gRPC."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from tests.serving.servers import CLIENTS, inputs, serving, texts
from tests.unit.bundles import BATCH, LABELS, LENGTH, TEXTS, as_array


def as_json(kind):
    """Asks the gRPC client for what the HTTP client gives anyway."""
    return {"as_json": True} if kind == "grpc" else {}


def int_values(value):
    """The gRPC client's JSON has 64-bit integers as strings."""
    if isinstance(value, dict):
        return {key: int_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [int_values(item) for item in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def statistics(client, kind, model="tiny"):
    answer = client.get_inference_statistics(model, **as_json(kind))
    return int_values(answer)["model_stats"][0]


def test_the_server_is_alive_and_ready(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny_core", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("tiny", "2")


def test_server_metadata(client, kind):
    metadata = client.get_server_metadata(**as_json(kind))
    assert metadata["name"] == "bothways"
    assert {"binary_tensor_data", "statistics", "model_configuration"} <= set(metadata["extensions"])


def test_model_metadata(client, kind):
    metadata = int_values(client.get_model_metadata("tiny_core", **as_json(kind)))
    assert metadata["platform"] == "onnxruntime_onnx"
    assert int_values(metadata["versions"]) == [1]
    names = ["input_ids", "attention_mask", "token_type_ids"]
    assert metadata["inputs"] == [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in names]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]
    text = int_values(client.get_model_metadata("tiny", "1", **as_json(kind)))
    assert text["inputs"] == [{"name": "TEXT", "datatype": "BYTES", "shape": [-1, 1]}]


@pytest.mark.parametrize("model", ["tiny", "tiny_core"])
def test_the_configuration_is_the_file_that_triton_reads(client, kind, bundle, model):
    file = text_format.Parse((bundle / f"models/{model}/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config = client.get_model_config(model)
    if kind == "grpc":
        assert config.config == file
    else:
        assert config["max_batch_size"] == BATCH
        assert [item["dims"] for item in config["input"]] == [list(item.dims) for item in file.input]
        assert [item["name"] for item in config["output"]] == [item.name for item in file.output]


def test_the_repository_index_names_both_models(client, kind):
    index = client.get_model_repository_index(**as_json(kind))
    models = index["models"] if kind == "grpc" else index
    assert [(model["name"], model["state"]) for model in models] == [("tiny", "READY"), ("tiny_core", "READY")]


@pytest.mark.parametrize("size", [1, 3, BATCH])
@pytest.mark.parametrize("binary", [True, False])
def test_texts_get_the_bundles_labels_and_scores(client, kind, opened, size, binary):
    result = client.infer("tiny", inputs(kind, texts(*TEXTS[:size]), binary), request_id="seven")
    expected = opened.predict([{"text": text} for text in TEXTS[:size]])
    assert [label.decode() for label in result.as_numpy("LABEL")[:, 0]] == [row["label"] for row in expected]
    np.testing.assert_allclose(result.as_numpy("SCORES"), as_array(expected), atol=1e-6)
    answer = result.get_response()
    assert (answer["id"] if kind == "http" else answer.id) == "seven"


@pytest.mark.parametrize("binary", [True, False])
def test_tokens_get_the_engines_logits(client, kind, opened, binary):
    arrays = opened.encode([{"text": text} for text in TEXTS[:BATCH]])
    result = client.infer("tiny_core", inputs(kind, arrays, binary), model_version="1")
    np.testing.assert_allclose(result.as_numpy("logits"), opened.engines["model"].run(arrays)["logits"], atol=1e-6)


@pytest.mark.parametrize("binary", [True, False])
def test_requested_outputs_come_in_the_form_that_was_asked_for(client, kind, binary):
    outputs = [CLIENTS[kind].InferRequestedOutput("SCORES", **({"binary_data": binary} if kind == "http" else {}))]
    result = client.infer("tiny", inputs(kind, texts("bad")), outputs=outputs)
    assert result.as_numpy("SCORES").shape == (1, 3)
    assert result.as_numpy("LABEL") is None
    if kind == "http":
        assert ("data" in result.get_output("SCORES")) != binary


def test_the_classification_extension_gives_the_best_labels(client, kind, opened):
    outputs = [CLIENTS[kind].InferRequestedOutput("SCORES", class_count=2)]
    found = client.infer("tiny", inputs(kind, texts(*TEXTS[:2])), outputs=outputs).as_numpy("SCORES")
    for row, prediction in zip(found, opened.predict([{"text": text} for text in TEXTS[:2]]), strict=True):
        best = sorted(prediction["scores"], key=prediction["scores"].get, reverse=True)[:2]
        expected = [f"{prediction['scores'][label]:f}:{LABELS.index(label)}:{label}" for label in best]
        assert [value.decode() for value in row] == expected


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_and_responses(server, opened, algorithm):
    arrays = opened.encode([{"text": text} for text in TEXTS[:BATCH]])
    http, grpc = server.client("http"), server.client("grpc")
    outputs = [CLIENTS["http"].InferRequestedOutput("logits", binary_data=False)]
    for wanted in (outputs, None):
        result = http.infer(
            "tiny_core",
            inputs("http", arrays),
            outputs=wanted,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        np.testing.assert_allclose(result.as_numpy("logits"), opened.engines["model"].run(arrays)["logits"], atol=1e-6)
    result = grpc.infer("tiny_core", inputs("grpc", arrays), compression_algorithm=algorithm)
    np.testing.assert_allclose(result.as_numpy("logits"), opened.engines["model"].run(arrays)["logits"], atol=1e-6)


ONES = np.ones((1, 3), dtype=np.int64)


def tokens(**changes):
    """Returns inputs of the token model, some of them spoilt."""
    return {"input_ids": ONES, "attention_mask": ONES, "token_type_ids": ONES, **changes}


@pytest.mark.parametrize(
    ("model", "arrays", "message"),
    [
        ("tiny", {"TXT": texts("a")["TEXT"]}, "no input 'TXT'; its inputs are TEXT"),
        ("tiny", {"TEXT": ONES}, "input 'TEXT' has datatype INT64, not BYTES"),
        ("tiny", {"TEXT": texts("a")["TEXT"][0]}, r"input 'TEXT' has shape \[1\], not \[-1, 1\]"),
        ("tiny", texts(*"abcde"), "takes 1 to 4 rows a request, not 5"),
        ("tiny_core", {"input_ids": ONES}, "input 'attention_mask' of model 'tiny_core' is missing"),
        ("tiny_core", tokens(input_ids=ONES.astype(np.float32)), "datatype FP32, not INT64"),
        ("tiny_core", tokens(attention_mask=np.repeat(ONES, 2, 0)), "different batch sizes"),
        ("tiny_core", tokens(attention_mask=ONES[:, :2]), "must have one shape"),
        ("tiny_core", dict.fromkeys(tokens(), np.ones((1, 33), np.int64)), "1 to 32 tokens"),
        ("tiny_core", tokens(input_ids=ONES * 99), "the vocabulary is 0 to 27"),
        ("tiny_core", tokens(input_ids=-ONES), "the vocabulary is 0 to 27"),
        ("tiny_core", tokens(token_type_ids=ONES * 9), "refuses these inputs"),
    ],
)
@pytest.mark.parametrize(("kind", "binary"), [("http", True), ("http", False), ("grpc", True)])
def test_a_bad_request_is_the_clients_mistake_in_one_line(client, kind, model, arrays, binary, message):
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(model, inputs(kind, arrays, binary))
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "\n" not in caught.value.message()


def test_bytes_that_are_no_text_are_the_clients_mistake(client, kind):
    with pytest.raises(InferenceServerException, match="input 'TEXT' holds a text that is not valid UTF-8"):
        client.infer("tiny", inputs(kind, {"TEXT": np.array([[b"\xff\xfe"]], dtype=np.object_)}))


def test_unknown_models_versions_and_outputs_are_named(client, kind):
    given = inputs(kind, texts("a"))
    for call, message in [
        (lambda: client.infer("other", given), "no model 'other'; the models are tiny, tiny_core"),
        (lambda: client.infer("tiny", given, model_version="3"), "no version 3"),
        (lambda: client.get_model_config("other"), "no model 'other'"),
        (lambda: client.get_model_metadata("other"), "no model 'other'"),
        (lambda: client.get_inference_statistics("other"), "no model 'other'"),
    ]:
        with pytest.raises(InferenceServerException, match=message) as caught:
            call()
        assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")
    with pytest.raises(InferenceServerException, match="no output 'LOGITS'; its outputs are LABEL, SCORES"):
        client.infer("tiny", given, outputs=[CLIENTS[kind].InferRequestedOutput("LOGITS")])
    with pytest.raises(InferenceServerException, match="output 'LABEL' has no labels"):
        client.infer("tiny", given, outputs=[CLIENTS[kind].InferRequestedOutput("LABEL", class_count=1)])


def test_statistics_count_requests_rows_and_executions(client, kind):
    before, core_before = statistics(client, kind), statistics(client, kind, "tiny_core")
    client.infer("tiny", inputs(kind, texts("a", "bad", "film")))
    after, core = statistics(client, kind), statistics(client, kind, "tiny_core")
    assert after["inference_count"] - before.get("inference_count", 0) == 3
    assert after["execution_count"] - before.get("execution_count", 0) == 1
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"].get("count", 0) == 1
    assert 3 in [batch["batch_size"] for batch in after["batch_stats"]]
    # As in Triton, the text model's call of the token model counts there.
    assert core["inference_count"] - core_before.get("inference_count", 0) == 3


def test_requests_that_wait_become_one_batch(bundle, kind, opened):
    with serving(bundle, batch_delay=20_000) as running, ThreadPoolExecutor(BATCH) as pool:
        client = running.client(kind)
        answers = list(pool.map(lambda text: _infer_alone(running, kind, text), TEXTS[:BATCH]))
        expected = opened.predict([{"text": text} for text in TEXTS[:BATCH]])
        np.testing.assert_allclose(np.concatenate(answers), as_array(expected), atol=1e-6)
        counted = statistics(client, kind)
        assert (counted["inference_count"], counted["execution_count"]) == (BATCH, 1)
        assert [batch["batch_size"] for batch in counted["batch_stats"]] == [BATCH]


def _infer_alone(running, kind, text):
    client = running.client(kind)
    try:
        return client.infer("tiny", inputs(kind, texts(text))).as_numpy("SCORES")
    finally:
        client.close()


def test_a_full_queue_refuses_at_once_and_what_waits_is_answered(bundle, kind):
    with serving(bundle, batch_delay=3000, max_queue=2) as running, ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(_infer_alone, running, kind, "bad") for _ in range(6)]
        errors = [future.exception() for future in waiting]
        refused = [error for error in errors if error]
        assert len(refused) == 4
        for error in refused:
            assert "2 requests wait already" in str(error)
            assert error.status() in ("503", "StatusCode.UNAVAILABLE")
        assert statistics(running.client(kind), kind)["inference_stats"]["fail"]["count"] == 4


def test_what_the_server_was_started_with_shows_in_its_configuration(bundle):
    with serving(bundle, max_batch=2, max_queue=7, batch_delay=1.5) as running:
        config = running.client("grpc").get_model_config("tiny").config
        assert config.max_batch_size == 2
        assert config.dynamic_batching.max_queue_delay_microseconds == 1500
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 7
        with pytest.raises(InferenceServerException, match="takes 1 to 2 rows"):
            running.client("http").infer("tiny", inputs("http", texts("a", "b", "c")))
        # A list that is longer than the queue is worked off batch by batch.
        assert len(running.json("POST", "/predict", ["bad"] * 40)[1]) == 40


def test_a_grpc_stream_answers_each_request_and_survives_a_bad_one(server):
    answers = []
    client = server.client("grpc")
    client.start_stream(callback=lambda result, error: answers.append((result, error)))
    for arrays in (texts("a"), texts(*"abcde"), texts("bad")):
        client.async_stream_infer("tiny", inputs("grpc", arrays))
    client.stop_stream()
    assert [error is None for _, error in answers] == [True, False, True]
    assert "1 to 4 rows" in str(answers[1][1])


def test_what_the_server_does_not_do_is_said(client, kind):
    with pytest.raises(InferenceServerException):
        client.load_model("tiny")
    item = CLIENTS[kind].InferInput("TEXT", [1, 1], "BYTES")
    item.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        client.infer("tiny", [item])


def test_every_length_up_to_the_bundles_is_answered(client, kind):
    long = " ".join(["film"] * 500)
    assert client.infer("tiny", inputs(kind, texts("", long, "a"))).as_numpy("SCORES").shape == (3, 3)
    full = dict.fromkeys(tokens(), np.ones((1, LENGTH), np.int64))
    assert client.infer("tiny_core", inputs(kind, full)).as_numpy("logits").shape == (1, 3)
