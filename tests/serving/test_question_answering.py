"""Question answering the whole way: fine-tuned, distilled, pruned, recovered, quantized, exported; equal answers everywhere."""

import json

import numpy as np
import pytest

from engine.stages.stage import read_stage
from export.report.page import write_report
from export.serving.bundle import Bundle, verify_bundle
from launch.cli import main
from tests.recipes import train_section, write_questions
from tests.serving.chains import answers_like_pytorch, prepared, run_stages, tensorrt_builds, whole_way
from tests.serving.servers import CLIENTS, inputs, serving
from tests.serving.triton_server import triton, why_not

DATA = {"train": "rows.json", "validation": "25%", "test": "25%"}
MAX_LENGTH = 24


def stages():
    train = train_section(steps=60, learning_rate=3e-3, evaluate_every=30)
    short = train_section(steps=40, learning_rate=2e-3, evaluate_every=20)
    task = {"type": "question_answering", "max_answer": 4}
    return whole_way(task, DATA, MAX_LENGTH, train, short, hidden=0.1)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(recipe, run directory) after every stage has run in this process."""
    directory = tmp_path_factory.mktemp("questions")
    write_questions(directory / "rows.json", 240)
    return run_stages(directory, stages())


def asked(rows):
    return [{name: row[name] for name in ("question", "context")} for row in rows]


def places(answers):
    return [(answer["answer"], answer["start"], answer["end"]) for answer in answers]


def test_every_stage_is_judged_by_the_f1_of_answers(chain):
    _, run = chain
    for stage in stages():
        record = read_stage(run / stage)
        assert record["metric"]["name"] == "f1"
        assert record["metrics"]["test"]["f1"] > 60, (stage, "something was learnt")
        if stage not in ("engine", "int8"):
            assert set(json.loads((run / stage / "per_class.json").read_text())["test"]) == {"answer", "(none)"}
    assert record["comparison"]["f1_drop_points"]["n"] == record["metrics"]["test"]["examples"]
    assert "f1" in write_report(run).read_text(encoding="utf-8")


def test_the_threshold_of_a_stage_goes_along_to_the_bundle(chain):
    _, run = chain
    kept = [json.loads((run / stage / "config.json").read_text())["bothways_task"] for stage in ("teacher", "recovered", "int8")]
    facts = Bundle.open(run / "engine").answers.facts
    assert all(each["may_be_none"] is True for each in kept)
    assert kept[1]["threshold"] == kept[2]["threshold"] == facts["threshold"]
    manifest = json.loads((run / "engine" / "manifest.json").read_text())
    assert [tensor["name"] for tensor in manifest["graphs"]["model"]["outputs"]] == ["start_logits", "end_logits"]


def test_the_bundle_verifies_and_its_answers_are_those_of_pytorch(chain):
    recipe, run = chain
    assert verify_bundle(run / "engine")["inputs"] > 20
    rows, bundle, given = answers_like_pytorch(recipe, run)
    assert places(bundle.predict(asked(rows))) == places(given)
    assert {answer["answer"] == "" for answer in given} == {True, False}


def test_tensorrt_builds_the_graph(chain):
    tensorrt_builds(chain[1], MAX_LENGTH)


def test_a_bundle_and_a_model_are_judged_on_another_file_as_in_their_stages(chain, capsys):
    recipe, run = chain
    data, stage = prepared(*chain[-2:], "recovered"), read_stage(run / "recovered")
    lines = "".join(json.dumps(row) + "\n" for row in data.rows["test"])
    (recipe.parent / "test.jsonl").write_text(lines)
    capsys.readouterr()
    for path in ("recovered", "engine"):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", str(run / path), str(recipe.parent / "test.jsonl"), "--json"])
        assert not stop.value.code
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        expected = read_stage(run / path)["metrics"]["test"]
        assert metrics["f1"]["value"] == pytest.approx(expected["f1"], abs=0.02)
        assert metrics["f1"]["low"] <= metrics["f1"]["value"] <= metrics["f1"]["high"]
    assert stage["metrics"]["test"]["examples"] == len(data.rows["test"])


def test_the_server_gives_the_answers_of_the_bundle_as_json(chain):
    _, run = chain
    rows = asked(prepared(*chain[-2:], "recovered").rows["test"][:12])
    expected = Bundle.open(run / "engine").predict(rows)
    with serving(run / "engine") as server:
        status, answers = server.json("POST", "/predict", rows)
        tensors = [
            {"name": name.upper(), "shape": [4, 1], "datatype": "BYTES", "data": [row[name] for row in rows[:4]]}
            for name in ("question", "context")
        ]
        _, response = server.json("POST", "/v2/models/tiny/infer", {"inputs": tensors})
    assert status == 200
    assert places(answers) == places(expected)
    (output,) = response["outputs"]
    assert places([json.loads(text) for text in output["data"]]) == places(expected[:4])


def test_real_tritonserver_gives_them_too(chain, tmp_path):
    if why_not():
        pytest.skip(why_not())
    _, run = chain
    rows = asked(prepared(*chain[-2:], "recovered").rows["test"][:6])
    rows += [{"question": "", "context": ""}, {"question": "a film", "context": "good film " * 300}]
    expected = Bundle.open(run / "engine").predict(rows)
    with triton(run / "engine" / "models", tmp_path) as (http, _):
        client = CLIENTS["http"].InferenceServerClient(http)
        columns = {name.upper(): np.array([[row[name].encode()] for row in rows], dtype=np.object_) for name in rows[0]}
        result = client.infer("tiny", inputs("http", columns)).as_numpy("ANSWER")
    given = [json.loads(text) for text in result[:, 0]]
    assert places(given[:-1]) == places(expected[:-1])
    # The same words stand in the last context 300 times: which of them are taken is a matter of the last bits.
    assert given[-1]["answer"] == expected[-1]["answer"]


# The command line


def call(capsys, *arguments):
    """Returns (exit status, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stop.value.code or 0, said.out, said.err


def test_questions_on_one_context_are_asked_on_the_command_line(chain, capsys, tmp_path, monkeypatch):
    _, run = chain
    (tmp_path / "context.txt").write_text("the actor was in a good film")
    status, out, _ = call(capsys, "predict", run / "engine", "a was", "b was", "--with", f"context=@{tmp_path / 'context.txt'}")
    given = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [each["input"]["question"] for each in given] == ["a was", "b was"]
    assert {each["answer"] for each in given} == {"good film"}
    monkeypatch.setattr("launch.predict.takes_colours", lambda stream: True)
    _, out, _ = call(capsys, "predict", run / "engine", "a was", "--with", "context=the actor was in a good film")
    assert out.startswith("a was\nthe actor was in a \x1b[") and "good film\x1b[1m [" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a was"], "a text is the question of this bundle, which also reads context: --with context=…, or rows by --input"),
        (["a was", "--with", "contxt=a"], "--with contxt: this bundle reads question, context: --with context=…"),
        (["a was", "--with", "context=@nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
        (["--input", "rows.json", "--with", "context=a"], "--with is for texts"),
    ],
)
def test_inputs_that_are_missing_or_unknown_are_one_line(chain, capsys, arguments, message):
    _, run = chain
    status, out, err = call(capsys, "predict", run / "engine", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
