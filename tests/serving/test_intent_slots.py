"""Intent and slots the whole way: trained, distilled, pruned, recovered, quantized, exported, and the same answers everywhere."""

import json

import pytest

from engine.stages.stage import read_stage
from export.report.page import write_report
from export.serving.bundle import Bundle, verify_bundle
from launch.cli import main
from tests.recipes import train_section, write_commands
from tests.serving.chains import answers_like_pytorch, prepared, run_stages, tensorrt_builds, whole_way
from tests.serving.servers import CLIENTS, inputs, serving, texts
from tests.serving.triton_server import triton, why_not

DATA = {"train": "rows", "validation": "25%", "test": "25%"}
MAX_LENGTH = 24


def stages_of(task):
    train = train_section(steps=80, learning_rate=3e-3, evaluate_every=40)
    short = train_section(steps=60, learning_rate=3e-3, evaluate_every=30)
    return whole_way(task, DATA, MAX_LENGTH, train, short)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(recipe, run directory) after every stage has run in this process."""
    directory = tmp_path_factory.mktemp("slots")
    write_commands(directory / "rows", 240)
    return run_stages(directory, stages_of({"type": "intent_slots", "crf": True}))


def as_texts(rows):
    return [" ".join(row["tokens"]) for row in rows]


def told(answers):
    return [(each["intent"], [(slot["start"], slot["end"], slot["type"]) for slot in each["entities"]]) for each in answers]


def test_every_stage_is_judged_by_sentences_that_are_right_in_everything(chain):
    _, run = chain
    for stage in stages_of({}):
        record = read_stage(run / stage)
        figures = record["metrics"]["test"]
        assert record["metric"]["name"] == "exact" and record["metric"]["counted"]
        assert figures["exact"] <= min(figures["intent_accuracy"], 100)
        assert figures["intent_accuracy"] > 60 and figures["slot_f1"] > 60, (stage, "something was learnt")
    classes = json.loads((run / "teacher" / "per_class.json").read_text())["test"]
    assert set(classes) == {"PLACE", "WORK", "intent:blame", "intent:praise"}
    assert record["comparison"]["exact_drop_points"]["n"] == figures["examples"]
    assert "<small>WORK</small></mark>" in write_report(run).read_text(encoding="utf-8")


def test_one_graph_gives_intent_slots_and_transitions_of_the_tags_alone(chain):
    _, run = chain
    manifest = json.loads((run / "engine" / "manifest.json").read_text())
    assert [tensor["name"] for tensor in manifest["graphs"]["model"]["outputs"]] == ["intent", "slots", "transitions"]
    bundle = Bundle.open(run / "engine")
    given = bundle.run("model", bundle.encode([{"text": "a good film"}]))
    assert given["intent"].shape == (1, 2) and given["slots"].shape[2] == 5 and given["transitions"].shape == (1, 7, 5)
    assert abs(given["transitions"]).max() > 0


def test_the_bundle_verifies_and_its_answers_are_those_of_pytorch(chain):
    recipe, run = chain
    assert verify_bundle(run / "engine")["inputs"] > 20
    rows, bundle, given = answers_like_pytorch(recipe, run)
    assert told(bundle.predict([{"text": text} for text in as_texts(rows)])) == told(given)


def test_the_command_line_predicts_and_evaluates(chain, capsys):
    recipe, run = chain
    rows = str(recipe.parent / "rows")
    for arguments in (["predict", str(run / "engine"), "--input", rows], ["evaluate", str(run / "engine"), rows]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[0]).keys() == {"input", "intent", "score", "entities"}
    assert "slot_f1" in output and "intent_accuracy" in output


def test_tensorrt_builds_the_graph(chain):
    tensorrt_builds(chain[1], MAX_LENGTH)


def test_the_server_gives_the_answers_of_the_bundle_as_json(chain):
    _, run = chain
    rows = as_texts(prepared(*chain[-2:], "recovered").rows["test"][:12])
    expected = told(Bundle.open(run / "engine").predict([{"text": text} for text in rows]))
    with serving(run / "engine") as server:
        status, answers = server.json("POST", "/predict", [{"text": text} for text in rows])
        tensor = {"name": "TEXT", "shape": [4, 1], "datatype": "BYTES", "data": rows[:4]}
        _, response = server.json("POST", "/v2/models/tiny/infer", {"inputs": [tensor]})
    assert status == 200
    assert told(answers) == expected
    (output,) = response["outputs"]
    assert told([json.loads(text) for text in output["data"]]) == expected[:4]


def test_real_tritonserver_gives_them_too(chain, tmp_path):
    if why_not():
        pytest.skip(why_not())
    _, run = chain
    rows = [*as_texts(prepared(*chain[-2:], "recovered").rows["test"][:6]), "", "good film " * 300]
    expected = Bundle.open(run / "engine").predict([{"text": text} for text in rows])
    with triton(run / "engine" / "models", tmp_path) as (http, _):
        client = CLIENTS["http"].InferenceServerClient(http)
        result = client.infer("tiny", inputs("http", texts(*rows))).as_numpy("ANSWER")
    assert told([json.loads(text) for text in result[:, 0]]) == told(expected)
