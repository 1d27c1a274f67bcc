"""The generated repository in the real tritonserver, unchanged; its answers are those of the bundle and of our server."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from export.serving.bundle import Bundle
from tests.serving.servers import CLIENTS, inputs, texts
from tests.serving.triton_server import RejectedError, triton, why_not
from tests.unit.bundles import BATCH, TEXTS, as_array, make_bundle


@pytest.fixture(scope="module")
def able():
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def addresses(able, bundle, tmp_path_factory):
    with triton(bundle / "models", tmp_path_factory.mktemp("triton")) as (http, grpc):
        yield {"http": http, "grpc": grpc}


@pytest.fixture
def real(addresses, kind):
    client = CLIENTS[kind].InferenceServerClient(addresses[kind])
    yield client
    client.close()


@pytest.mark.parametrize("model", ["tiny", "tiny_core"])
def test_each_configuration_is_a_triton_model_configuration(bundle, model):
    config = text_format.Parse((bundle / f"models/{model}/config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == model
    assert config.HasField("dynamic_batching") == (model == "tiny")


def test_texts_get_the_bundles_labels_and_scores_in_triton(real, kind, opened):
    for size in (1, 3, BATCH):
        result = real.infer("tiny", inputs(kind, texts(*TEXTS[:size])))
        expected = opened.predict([{"text": text} for text in TEXTS[:size]])
        assert [label.decode() for label in result.as_numpy("LABEL")[:, 0]] == [row["label"] for row in expected]
        np.testing.assert_allclose(result.as_numpy("SCORES"), as_array(expected), atol=1e-6)


def test_tokens_get_the_engines_logits_in_triton(real, kind, opened):
    arrays = opened.encode([{"text": text} for text in TEXTS[:BATCH]])
    result = real.infer("tiny_core", inputs(kind, arrays))
    np.testing.assert_allclose(result.as_numpy("logits"), opened.engines["model"].run(arrays)["logits"], atol=1e-6)


def test_texts_of_any_length_that_wait_are_executed_together_by_triton(addresses, opened):
    rows = [*TEXTS, "", "film " * 500] * 8
    client = CLIENTS["grpc"].InferenceServerClient(addresses["grpc"])
    before = client.get_inference_statistics("tiny").model_stats[0]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: client.infer("tiny", inputs("grpc", texts(text))).as_numpy("SCORES"), rows))
    after = client.get_inference_statistics("tiny").model_stats[0]
    expected = as_array(opened.predict([{"text": text} for text in rows]))
    np.testing.assert_allclose(np.concatenate(answers), expected, atol=1e-6)
    assert after.inference_count - before.inference_count == len(rows)
    assert after.execution_count - before.execution_count < len(rows)


def test_one_text_that_is_not_utf8_fails_alone(real, kind):
    with pytest.raises(InferenceServerException, match="not valid UTF-8"):
        real.infer("tiny", inputs(kind, {"TEXT": np.array([[b"\xff"]], dtype=np.object_)}))
    assert real.infer("tiny", inputs(kind, texts("bad"))).as_numpy("SCORES").shape == (1, 3)


def test_metadata_and_configuration_are_the_same_on_both_servers(real, server, kind):
    ours = server.client(kind)
    options = {"as_json": True} if kind == "grpc" else {}
    for model in ("tiny", "tiny_core"):
        assert ours.get_model_metadata(model, **options) == real.get_model_metadata(model, **options)
        mine, theirs = ours.get_model_config(model, **options), real.get_model_config(model, **options)
        mine, theirs = mine.get("config", mine), theirs.get("config", theirs)
        for key in ("name", "max_batch_size", "input", "output", "parameters"):
            assert mine.get(key) == theirs.get(key), key


def test_the_classification_extension_gives_the_same_on_both_servers(real, server, kind):
    def best(client):
        outputs = [CLIENTS[kind].InferRequestedOutput("SCORES", class_count=2)]
        return client.infer("tiny", inputs(kind, texts(*TEXTS[:3])), outputs=outputs).as_numpy("SCORES").tolist()

    assert best(real) == best(server.client(kind))


def test_pairs_of_texts_are_answered_by_triton(able, bundle, tmp_path):
    pairs = [("a good film", "the film is good"), ("bad", "not good")]
    make_bundle(tmp_path / "pairs", bundle.parent / "work", texts=pairs, pair="text_pair")
    given = texts("a good film") | {"TEXT_PAIR": texts("bad")["TEXT"]}
    expected = as_array(Bundle.open(tmp_path / "pairs").predict([{"text": "a good film", "text_pair": "bad"}]))
    with triton(tmp_path / "pairs/models", tmp_path) as (http, _):
        scores = CLIENTS["http"].InferenceServerClient(http).infer("tiny", inputs("http", given)).as_numpy("SCORES")
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_with_a_plan_triton_runs_the_plan(able, bundle, tmp_path):
    """The backend runs ONNX from model.plan: it proves the layout and the configuration, not TensorRT."""
    work = bundle.parent / "work"
    make_bundle(tmp_path / "plan", work, engines={"model": {"onnxruntime": work / "model.onnx", "tensorrt": work / "model.onnx"}})
    (tmp_path / "plan/models/tiny_core/1/model.onnx").unlink()
    with triton(tmp_path / "plan/models", tmp_path) as (http, _):
        client = CLIENTS["http"].InferenceServerClient(http)
        assert client.get_model_metadata("tiny_core")["platform"] == "tensorrt_plan"
        assert client.infer("tiny", inputs("http", texts("bad"))).as_numpy("SCORES").shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "before", "after", "message"),
    [
        ("tiny_core", 'name: "logits"', 'name: "scores"', "unexpected output ['scores']"),
        ("tiny_core", 'name: "input_ids"', 'name: "ids"', "unexpected input ['ids']"),
        ("tiny", "max_batch_size", "max_batch", 'has no field named "max_batch"'),
    ],
)
def test_a_wrong_configuration_is_rejected_by_triton(able, bundle, tmp_path, model, before, after, message):
    shutil.copytree(bundle / "models", tmp_path / "wrong")
    config = tmp_path / "wrong" / model / "config.pbtxt"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))
    with pytest.raises(RejectedError) as caught, triton(tmp_path / "wrong", tmp_path):
        pass
    assert message in str(caught.value)
