"""Every task the whole way: fine-tuned, distilled, pruned, recovered, quantized, exported, and the same answers everywhere."""

import itertools
import json

import numpy as np
import pytest
import torch

from engine.answers._batches import answer_all
from engine.evaluate import torch_run
from engine.models import load_model
from engine.stages.stage import read_stage
from export.report.page import write_report
from export.serving.bundle import Bundle, verify_bundle
from tests.recipes import ragged_rows, train_section, write_rows
from tests.serving.chains import prepared, run_stages, whole_way
from tests.serving.servers import CLIENTS, inputs, serving
from tests.serving.triton_server import triton, why_not

GOOD, BAD = {"good", "great", "warm"}, {"bad", "dull", "cold"}
DATA = {"train": "rows.jsonl", "validation": "25%", "test": "25%"}


def pairs(rows):
    """Pairs of texts with two numbers: how much good is in both, and how long they are."""
    made = []
    for own, other in itertools.pairwise(rows):
        words = [*own["text"].split(), *other["text"].split()]
        made.append({"a": own["text"], "b": other["text"], "good": 3 + sum(w in GOOD for w in words), "words": len(words)})
    return made


def labelled(rows):
    """Texts with the labels of their words, separated by `|`; many have none or both."""
    kinds = {"good": GOOD, "bad": BAD}
    found = [[name for name, words in kinds.items() if words & set(row["text"].split())] for row in rows]
    return [{"text": row["text"], "tags": "|".join(labels)} for row, labels in zip(rows, found, strict=True)]


TASKS = {
    "classification": ({"type": "classification", "metric": "matthews", "class_weights": "balanced"}, list),
    "regression": (
        {"type": "regression", "text": "a", "text_pair": "b", "label": ["good", "words"], "loss": "huber"},
        pairs,
    ),
    "multi_label": ({"type": "multi_label", "label": "tags", "separator": "|"}, labelled),
}


def stages_of(task):
    """The chain; task, data and length are said once."""
    train = train_section(steps=60, learning_rate=3e-3, evaluate_every=30)
    short = train_section(steps=20, evaluate_every=10)
    return whole_way(task, DATA, 48, train, short)


@pytest.fixture(scope="module", params=TASKS)
def chain(request, tmp_path_factory):
    """(name of the task, recipe, run directory) after every stage has run in this process."""
    task, rows_of = TASKS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    write_rows(directory / "rows.jsonl", rows_of(ragged_rows(240)))
    return request.param, *run_stages(directory, stages_of(task))


def inputs_of(bundle, rows):
    return [{name: row[column] for name, column in bundle.answers.columns.items()} for row in rows]


def numbers(answers):
    """Every number of some answers, one row each."""
    key = "values" if "values" in answers[0] else "scores"
    return np.array([list(answer[key].values()) for answer in answers])


def test_every_stage_is_judged_by_the_figure_of_the_task(chain):
    task, _, run = chain
    name = {"classification": "matthews", "regression": "pearson", "multi_label": "f1_micro"}[task]
    for stage in stages_of({}):
        record = read_stage(run / stage)
        assert record["metric"]["name"] == name
        assert name in record["metrics"]["test"], stage
    assert record["comparison"][f"{name}_drop_points"]["n"] == record["metrics"]["test"]["examples"]
    assert read_stage(run / "teacher")["metrics"]["test"][name] > 30, "something was learnt"
    page = write_report(run).read_text(encoding="utf-8")
    assert name in page and f"{name} in <" not in page and f"{name.capitalize()}, <" not in page


def test_what_was_learnt_beside_the_weights_goes_from_stage_to_stage_into_the_bundle(chain):
    task, _, run = chain
    kept = {"classification": (), "regression": ("mean", "sd"), "multi_label": ("thresholds",)}[task]
    recovered, facts = json.loads((run / "recovered" / "config.json").read_text())["bothways_task"], {}
    manifest = json.loads((run / "engine" / "manifest.json").read_text())
    served = json.loads((run / "engine" / "models" / "tiny" / "1" / "task.json").read_text())
    for key in kept:
        facts[key] = recovered[key]
        assert manifest["task"]["facts"][key] == served["facts"][key] == facts[key]
        assert json.loads((run / "int8" / "config.json").read_text())["bothways_task"][key] == facts[key]
    if task == "multi_label":
        assert facts["thresholds"] != [0.5, 0.5]
    if task == "regression":
        rows = prepared(*chain[-2:], "teacher").rows["train"]
        np.testing.assert_allclose(facts["mean"], np.mean([[row["good"], row["words"]] for row in rows], axis=0))


def test_the_bundle_verifies_and_its_answers_are_those_of_pytorch(chain):
    _, _, run = chain
    assert verify_bundle(run / "engine")["inputs"] > 20
    data, bundle = prepared(*chain[-2:], "recovered"), Bundle.open(run / "engine")
    model = load_model(run / "recovered", data.task.head).eval()
    with torch.no_grad():
        expected = answer_all(data.task.answers, torch_run(model, data.task), data.rows["test"], 16)
    given = bundle.predict(inputs_of(bundle, data.rows["test"]))
    assert data.task.answers.agreement(given, expected) >= 0.9
    assert given == answer_all(bundle.answers, bundle.run, data.rows["test"], 8), "by the columns of the data, too"
    spread = np.ptp(numbers(expected), axis=0).max()
    assert np.abs(numbers(given) - numbers(expected)).max() < 0.2 * spread, "int8 beside fp32"


def test_the_server_gives_the_answers_of_the_bundle(chain):
    _, _, run = chain
    bundle = Bundle.open(run / "engine")
    rows = inputs_of(bundle, prepared(*chain[-2:], "recovered").rows["test"][:12])
    expected = bundle.predict(rows)
    with serving(run / "engine") as server:
        status, answers = server.json("POST", "/predict", rows)
        columns = {name.upper(): [row[name] for row in rows[:4]] for name in bundle.answers.columns}
        tensors = [{"name": name, "shape": [4, 1], "datatype": "BYTES", "data": texts} for name, texts in columns.items()]
        _, response = server.json("POST", "/v2/models/tiny/infer", {"inputs": tensors})
    assert status == 200
    np.testing.assert_allclose(numbers(answers), numbers(expected), atol=1e-5)
    assert [answer.get("labels") for answer in answers] == [answer.get("labels") for answer in expected]
    outputs = {tensor["name"]: np.array(tensor["data"]) for tensor in response["outputs"]}
    mine = bundle.answers.tensors(expected[:4])
    assert outputs.keys() == mine.keys()
    for name, array in mine.items():
        if array.dtype == np.object_:
            assert outputs[name].tolist() == [text.decode() for text in array.ravel()]
        else:
            np.testing.assert_allclose(outputs[name], array.ravel(), atol=1e-4)


def test_real_tritonserver_gives_them_too(chain, tmp_path):
    if why_not():
        pytest.skip(why_not())
    _, _, run = chain
    bundle = Bundle.open(run / "engine")
    rows = inputs_of(bundle, prepared(*chain[-2:], "recovered").rows["test"][:6])
    expected = bundle.answers.tensors(bundle.predict(rows))
    arrays = {name.upper(): np.array([[row[name].encode()] for row in rows], dtype=object) for name in bundle.answers.columns}
    with triton(run / "engine" / "models", tmp_path) as (http, _):
        result = CLIENTS["http"].InferenceServerClient(http).infer("tiny", inputs("http", arrays))
        for name, array in expected.items():
            if array.dtype == np.object_:
                assert result.as_numpy(name).tolist() == array.tolist()
            else:
                np.testing.assert_allclose(result.as_numpy(name), array, atol=1e-4)
