"""What HTTP clients without tritonclient do, and get wrong; the plain text route and the metrics."""

import gzip
import json
import zlib

import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.serving.http_frontend import MAX_BODY
from tests.serving.servers import serving
from tests.unit.bundles import BATCH, TEXTS, make_bundle

TEXT = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["bad"]}


def infer(server, body, model="tiny", headers=None):
    return server.json("POST", f"/v2/models/{model}/infer", body, headers)


def test_a_text_is_answered_as_the_bundle_predicts(server, opened):
    expected = opened.predict([{"text": "a good film"}])[0]
    for body, headers in [
        (json.dumps({"text": "a good film"}), {}),
        (json.dumps("a good film"), {}),
        ("a good film", {"Content-Type": "text/plain; charset=utf-8"}),
    ]:
        status, answer = server.request("POST", "/predict", body, headers)
        answer = json.loads(answer)
        assert (status, answer["label"]) == (200, expected["label"])
        assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-6)


def test_lists_of_any_length_are_answered_in_order(server, opened):
    rows = TEXTS * 3
    assert len(rows) > BATCH
    expected = [row["label"] for row in opened.predict([{"text": text} for text in rows])]
    for body in (rows, {"text": rows}, [{"text": text} for text in rows]):
        status, answer = server.json("POST", "/predict", body)
        assert status == 200
        assert [row["label"] for row in answer] == expected
    assert server.json("POST", "/predict", []) == (200, [])


def test_pairs_of_texts_are_answered(bundle, tmp_path):
    pairs = [("a good film", "the film is good"), ("bad", "not good")]
    make_bundle(tmp_path / "pairs", bundle.parent / "work", texts=pairs, pair="text_pair")
    row = {"text": "a good film", "text_pair": "bad"}
    with serving(tmp_path / "pairs") as running:
        status, alone = running.json("POST", "/predict", row)
        assert status == 200
        assert running.json("POST", "/predict", {"text": [row["text"]], "text_pair": [row["text_pair"]]}) == (200, [alone])
        assert running.json("POST", "/predict", {"text": "a"})[0] == 400
        assert running.json("POST", "/predict", {"text": ["a"], "text_pair": []})[0] == 400


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"{", {}, "not valid JSON"),
        (b'{"txt": "a"}', {}, "a row must be an object with text, or a string"),
        (b'{"text": 7}', {}, "a row must be"),
        (b'[["a"]]', {}, "a row must be"),
        (b"7", {}, "must be an object or an array or a string, not int"),
        (b"\xff", {"Content-Type": "text/plain"}, "not valid UTF-8"),
        (b'"\\ud800"', {}, "not valid JSON"),
        (b"[" * 5000, {}, "not valid JSON"),
    ],
)
def test_a_row_that_is_none_is_the_clients_mistake(server, body, headers, message):
    status, answer = server.request("POST", "/predict", body, headers)
    assert status == 400
    assert message in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be an object"),
        ({}, "'inputs' must be an array"),
        ({"inputs": []}, "input 'TEXT' of model 'tiny' is missing"),
        ({"inputs": [7]}, "every input must be an object"),
        ({"inputs": [{"shape": [1, 1]}]}, "'name' must be a string"),
        ({"inputs": [TEXT, TEXT]}, "given twice"),
        ({"inputs": [{**TEXT, "shape": [1, "1"]}]}, "'shape' must be integers"),
        ({"inputs": [{**TEXT, "shape": [True, 1]}]}, "'shape' must be integers"),
        ({"inputs": [{**TEXT, "shape": [-1, 1]}]}, "has shape [-1, 1], not [-1, 1]"),
        ({"inputs": [{**TEXT, "shape": [10**18, 1]}]}, "has 1 elements, but shape"),
        ({"inputs": [{**TEXT, "shape": [0, 1], "data": []}]}, "takes 1 to 4 rows"),
        ({"inputs": [{**TEXT, "data": [7]}]}, "an element is int, not a string: 7"),
        ({"inputs": [{**TEXT, "data": "bad"}]}, "'data' must be an array"),
        ({"inputs": [{**TEXT, "data": [["a"], "b"]}]}, "an element is list"),
        ({"inputs": [{**TEXT, "datatype": "STRING"}]}, "has datatype STRING, not BYTES"),
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": 9}}]}, "binary_data_size 9 is more than the 0 bytes"),
        ({"inputs": [{**TEXT, "parameters": {"binary_data_size": -1}}]}, "binary_data_size -1"),
        ({"inputs": [{**TEXT, "parameters": 7}]}, "'parameters' must be an object"),
        ({"inputs": [TEXT], "outputs": [{"name": 7}]}, "'name' must be a string"),
        ({"inputs": [TEXT], "outputs": ["LABEL"]}, "every output must be an object"),
        ({"inputs": [TEXT], "outputs": [{"name": "SCORES", "parameters": {"binary_data": "yes"}}]}, "must be true or false"),
    ],
)
def test_an_inference_request_that_is_none_is_the_clients_mistake(server, body, message):
    status, answer = infer(server, body)
    assert (status, message in answer["error"]) == (400, True), answer


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1.5, 1, 1], "an element is float, not an integer"),
        ([True, 1, 1], "an element is bool, not an integer"),
        ([2**63, 1, 1], "outside the range of INT64"),
        ([1, 1], "has 2 elements, but shape [1, 3] needs 3"),
    ],
)
def test_token_ids_in_json_are_integers(server, data, message):
    tensor = {"shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]}
    tensors = [{"name": name, **tensor} for name in ("attention_mask", "token_type_ids")]
    status, answer = infer(server, {"inputs": [{"name": "input_ids", **tensor, "data": data}, *tensors]}, "tiny_core")
    assert (status, message in answer["error"]) == (400, True), answer


def test_json_data_may_be_nested_as_its_shape_is(server):
    for data in (["bad", "good"], [["bad"], ["good"]]):
        status, answer = infer(server, {"inputs": [{**TEXT, "shape": [2, 1], "data": data}]})
        assert status == 200
        assert [output["shape"] for output in answer["outputs"]] == [[2, 1], [2, 3]]
        assert len(answer["outputs"][1]["data"]) == 6


NULLS = {"id": None, "parameters": None, "outputs": None}


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [TEXT], **NULLS},
        {"inputs": [{**TEXT, "parameters": None}]},
        {"inputs": [{**TEXT, "parameters": {"binary_data_size": None, "shared_memory_region": None}}]},
        {"inputs": [TEXT], "parameters": {"binary_data_output": None}},
        {"inputs": [TEXT], "outputs": [{"name": "LABEL", "parameters": None}, {"name": "SCORES"}]},
        {
            "inputs": [TEXT],
            "outputs": [{"name": "LABEL", "parameters": {"binary_data": None, "classification": None}}, {"name": "SCORES"}],
        },
    ],
)
def test_an_optional_field_that_is_null_is_absent(server, body):
    assert infer(server, body) == infer(server, {"inputs": [TEXT]})
    assert infer(server, body)[0] == 200


@pytest.mark.parametrize("key", ["name", "shape", "datatype", "data"])
def test_a_field_that_is_needed_is_not_null(server, key):
    status, answer = infer(server, {"inputs": [{**TEXT, key: None}]})
    assert (status, f"'{key}' must be" in answer["error"]) == (400, True), answer


def binary_request(tensor, size=None):
    head = json.dumps({"inputs": [{**TEXT, "data": [], "parameters": {"binary_data_size": size or len(tensor)}}]}).encode()
    return head + tensor, {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize(
    ("tensor", "size", "message"),
    [
        (b"\x09\x00\x00\x00bad", None, "ends after the data"),
        (b"\x03\x00", None, "ends after the data"),
        (b"\x03\x00\x00\x00bad\x01\x00\x00\x00x", None, "has 2 elements, but shape [1, 1] needs 1"),
        (b"\x03\x00\x00\x00badrest", 7, "4 bytes behind the binary tensors belong to none"),
    ],
)
def test_binary_tensors_end_where_they_say(server, tensor, size, message):
    body, headers = binary_request(tensor, size)
    status, answer = server.request("POST", "/v2/models/tiny/infer", body, headers)
    assert status == 400
    assert message in json.loads(answer)["error"]


@pytest.mark.parametrize("length", ["-1", "99999", "x", "²"])
def test_the_header_length_must_lie_within_the_request(server, length):
    body, _ = binary_request(b"\x03\x00\x00\x00bad")
    headers = {"Inference-Header-Content-Length": length.encode("latin-1")}
    status, answer = server.request("POST", "/v2/models/tiny/infer", body, headers)
    assert status == 400
    assert "Inference-Header-Content-Length" in json.loads(answer)["error"]


def test_requests_that_are_too_large_are_refused_compressed_or_not(server):
    status, answer = server.request("POST", "/predict", b" " * (MAX_BODY + 1))
    assert (status, b"larger than" in answer) == (413, True)
    status, answer = server.request("POST", "/predict", gzip.compress(b" " * (MAX_BODY + 1)), {"Content-Encoding": "gzip"})
    assert (status, b"when it is decompressed" in answer) == (413, True)


def test_damaged_and_unknown_compression_is_the_clients_mistake(server):
    whole = gzip.compress(b'{"text": "bad"}')
    for body, encoding, expected in [
        (whole, "gzip", 200),
        (zlib.compress(b'{"text": "bad"}'), "deflate", 200),
        (whole[:-9], "gzip", 400),
        (b"nonsense", "gzip", 400),
        (whole, "br", 415),
    ]:
        assert server.request("POST", "/predict", body, {"Content-Encoding": encoding})[0] == expected


def test_other_paths_and_methods_are_told_apart(server):
    assert server.json("GET", "/nowhere")[0] == 404
    assert server.json("GET", "/predict")[0] == 405
    assert server.json("GET", "/v2/models/tiny/versions/2")[0] == 404
    assert server.json("GET", "/v2/models/tiny/versions/1")[1]["name"] == "tiny"


def samples(server):
    """Returns {(name, *labels): value}; the parser ends the names of counters with _total."""
    families = text_string_to_metric_families(server.request("GET", "/metrics")[1].decode())
    found = [item for family in families for item in family.samples]
    return {(item.name.removesuffix("_total"), *sorted(item.labels.items())): item.value for item in found}


def test_metrics_count_by_tritons_names_and_measure_latency(server):
    text = (("model", "tiny"), ("version", "1"))
    before = samples(server)
    server.json("POST", "/predict", TEXTS[:3])
    after = samples(server)

    def gained(*key):
        return after[key] - before.get(key, 0)

    assert gained("nv_inference_count", *text) == 3
    assert gained("nv_inference_exec_count", *text) == 1
    assert gained("nv_inference_request_success", *text) == 1
    assert gained("nv_inference_count", ("model", "tiny_core"), ("version", "1")) == 3
    assert gained("bothways_request_seconds_count", ("model", "tiny"), ("status", "200")) == 1
    assert after["nv_inference_pending_request_count", *text] == 0
    assert after[("process_resident_memory_bytes",)] > 0
