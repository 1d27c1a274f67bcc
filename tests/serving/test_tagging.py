"""Tagging the whole way: fine-tuned, distilled, pruned, recovered, quantized, exported, and the same entities everywhere."""

import json

import numpy as np
import pytest

from engine.stages.stage import read_stage
from export.report.page import write_report
from export.serving.bundle import Bundle, verify_bundle
from tests.recipes import train_section, write_sentences
from tests.serving.chains import answers_like_pytorch, prepared, run_stages, tensorrt_builds, whole_way
from tests.serving.servers import CLIENTS, inputs, serving, texts
from tests.serving.triton_server import triton, why_not

DATA = {"train": "rows.conll", "validation": "25%", "test": "25%"}
MAX_LENGTH = 24


def stages_of(crf):
    train = train_section(steps=60, learning_rate=3e-3, evaluate_every=30)
    short = train_section(steps=20, evaluate_every=10)
    task = {"type": "tagging", "crf": crf}
    return whole_way(task, DATA, MAX_LENGTH, train, short)


@pytest.fixture(scope="module", params=[False, True], ids=["softmax", "crf"])
def chain(request, tmp_path_factory):
    """(whether there is a CRF, recipe, run directory) after every stage has run in this process."""
    directory = tmp_path_factory.mktemp("tagging")
    write_sentences(directory / "rows.conll", 240)
    return request.param, *run_stages(directory, stages_of(request.param))


def as_texts(rows):
    return [" ".join(row["text"]) for row in rows]


def places(answers):
    return [[(each["start"], each["end"], each["type"]) for each in answer["entities"]] for answer in answers]


def test_every_stage_is_judged_by_the_f1_of_entities(chain):
    _, _, run = chain
    for stage in stages_of(True):
        record = read_stage(run / stage)
        assert record["metric"]["name"] == "f1"
        assert record["metrics"]["test"]["f1"] > 60, (stage, "something was learnt")
        if stage not in ("engine", "int8"):
            assert set(json.loads((run / stage / "per_class.json").read_text())["test"]) == {"PLACE", "WORK"}
    assert record["comparison"]["f1_drop_points"]["n"] == record["metrics"]["test"]["examples"]
    page = write_report(run).read_text(encoding="utf-8")
    assert "<small>WORK</small></mark>" in page and "Confusion matrix" in page, (
        "gold and predicted spans are marked in the worst rows"
    )


def test_transitions_are_trained_saved_imitated_and_exported_with_the_model(chain):
    crf, _, run = chain
    from safetensors.torch import load_file

    weights = [load_file(run / stage / "model.safetensors").get("crf.weight") for stage in ("teacher", "student", "recovered")]
    manifest = json.loads((run / "engine" / "manifest.json").read_text())
    outputs = [tensor["name"] for tensor in manifest["graphs"]["model"]["outputs"]]
    assert outputs == (["logits", "transitions"] if crf else ["logits"])
    for weight in weights:
        assert (weight is not None and weight.abs().max() > 0) if crf else weight is None
    if crf:
        bundle = Bundle.open(run / "engine")
        given = bundle.run("model", bundle.encode([{"text": "a good film"}]))["transitions"][0]
        np.testing.assert_array_equal(given, weights[2].numpy() * np.float32(100))


def test_the_bundle_verifies_and_its_answers_are_those_of_pytorch(chain):
    _, recipe, run = chain
    assert verify_bundle(run / "engine")["inputs"] > 20
    rows, bundle, given = answers_like_pytorch(recipe, run)
    assert places(bundle.predict([{"text": text} for text in as_texts(rows)])) == places(given), (
        "these words stand between spaces"
    )


def test_tensorrt_builds_the_graph(chain):
    tensorrt_builds(chain[2], MAX_LENGTH)


def test_the_server_gives_the_entities_of_the_bundle_as_json(chain):
    _, _, run = chain
    rows = as_texts(prepared(*chain[-2:], "recovered").rows["test"][:12])
    expected = Bundle.open(run / "engine").predict([{"text": text} for text in rows])
    with serving(run / "engine") as server:
        status, answers = server.json("POST", "/predict", [{"text": text} for text in rows])
        tensor = {"name": "TEXT", "shape": [4, 1], "datatype": "BYTES", "data": rows[:4]}
        _, response = server.json("POST", "/v2/models/tiny/infer", {"inputs": [tensor]})
    assert status == 200
    assert places(answers) == places(expected)
    (output,) = response["outputs"]
    assert places([json.loads(text) for text in output["data"]]) == places(expected[:4])


def test_real_tritonserver_gives_them_too(chain, tmp_path):
    if why_not():
        pytest.skip(why_not())
    _, _, run = chain
    rows = [*as_texts(prepared(*chain[-2:], "recovered").rows["test"][:6]), "", "good film " * 300]
    expected = Bundle.open(run / "engine").predict([{"text": text} for text in rows])
    with triton(run / "engine" / "models", tmp_path) as (http, _):
        client = CLIENTS["http"].InferenceServerClient(http)
        result = client.infer("tiny", inputs("http", texts(*rows))).as_numpy("ANSWER")
    assert places([json.loads(text) for text in result[:, 0]]) == places(expected)
