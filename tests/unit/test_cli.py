"""The command line on bad input: exit status 2, one line that names what to mend, nothing written; and on good input."""

import io
import json
import socket
import sys
from pathlib import Path

import pytest

from engine.stages.stage import hash_directory
from launch import predict
from tests.recipes import finetune_section, pretrain_section, ragged_rows, write_recipe, write_rows
from tests.unit.bundles import LABELS, TEXTS, copy_bundle, shared_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return shared_bundle(tmp_path_factory)


def rows_with(spoil):
    def change(directory):
        rows = ragged_rows(64)
        spoil(rows)
        write_rows(directory / "rows.jsonl", rows)

    return change


def malformed(directory):
    path = directory / "rows.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], lines[6][:-4], *lines[7:]]))


def unlabelled(rows):
    del rows[8]["label"]


def empty_text(rows):
    rows[4]["text"] = ""


def without_weights(directory):
    (directory / "model/model.safetensors").unlink()


BAD_RECIPES = {
    "unknown recipe key": ({"teacher": {"finetune": finetune_section(epochs=3)}}, None, ":", "unknown key 'epochs'"),
    "unknown stage kind": ({"teacher": {"fintune": {}}}, None, "recipe.yaml:", "did you mean 'finetune'?"),
    "missing file": ({"teacher": {"finetune": finetune_section(data={"train": "row.jsonl"})}}, None, "recipe.yaml:", "row.jsonl"),
    "malformed line": (None, malformed, "rows.jsonl:7: ", "not valid JSON"),
    "label missing in some rows": (None, rows_with(unlabelled), "rows.jsonl:9: ", "no column 'label'"),
    "empty text": (None, rows_with(empty_text), "rows.jsonl:5: ", "column 'text' is empty"),
    "empty data": (None, lambda directory: write_rows(directory / "rows.jsonl", []), "rows.jsonl: ", "no rows"),
    "unknown task": (
        {"t": {"finetune": finetune_section(task={"type": "clasify"})}},
        None,
        ":",
        "unknown task 'clasify' (known: classification, ",
    ),
    "unknown model": ({"teacher": {"finetune": finetune_section(model="modle")}}, None, ":", "model 'modle' is no stage"),
    "unknown ZeRO name": ({"teacher": {"finetune": finetune_section(parallel="zero9")}}, None, ":", "did you mean 'zero"),
    "model without weights": (None, without_weights, "model: ", "a model directory without weights"),
    "length above positions": ({"t": {"finetune": finetune_section(max_length=65)}}, None, ":", "above the 64 positions"),
    "sequence above positions": (
        {"p": {"pretrain": pretrain_section(sequence_length=65)}},
        None,
        ":",
        "above model.positions=64",
    ),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, call, command, case):
    stages, spoil, place, message = BAD_RECIPES[case]
    recipe = write_recipe(tmp_path / "work", stages)
    if spoil:
        spoil(tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    before = hash_directory(tmp_path)
    status, out, err = call(command, recipe)
    assert_one_line(status, err, place, message)
    assert out == ""
    assert hash_directory(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def assert_one_line(status, err, *parts):
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "recipe.yaml"], "recipe.yaml: no such recipe"),
        (["run", "--sett", "x"], "No such option"),
        (["check", "."], ".: cannot be read"),
        (["predict", "nowhere", "text"], "nowhere: no such bundle"),
        (["verify", "nowhere"], "nowhere: no such bundle"),
        (["serve", "nowhere"], "nowhere: no such bundle"),
        (["serve", "nowhere", "--http-port", "70000"], "Invalid value for '--http-port'"),
        (["benchmark", "nowhere", "--threads", "0"], "Invalid value for '--threads'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, call, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(*arguments)
    assert_one_line(status, err, message)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_directory_is_needed_is_one_line(tmp_path, call):
    path = write_recipe(tmp_path)
    assert_one_line(*call("run", path, "--runs", path)[::2], str(path), "Not a directory")


def test_a_stage_that_does_not_exist_or_waits_for_another_is_named(tmp_path, call):
    recipe = write_recipe(
        tmp_path, {"base": {"pretrain": pretrain_section()}, "top": {"finetune": finetune_section(model="base")}}
    )
    for command in ("run",), ("launch", "--dry-run"), ("launch", "--hosts", "a,b", "--shell", "env {host}"):
        status, _, err = call(command[0], recipe, *command[1:], "--stage", "tpo", "--runs", tmp_path / "runs")
        assert_one_line(status, err, "no such stage: did you mean 'top'?")
    status, _, err = call("plan", recipe, "--stage", "tpo", "--runs", tmp_path / "runs")
    assert_one_line(status, err, "no such stage: did you mean 'top'?")
    status, _, err = call("run", recipe, "--stage", "top", "--runs", tmp_path / "runs")
    assert_one_line(status, err, "it needs stage 'base', which has not finished: add --stage base")
    assert not (tmp_path / "runs").exists()


def test_help_names_every_command_and_shows_examples(call):
    status, out, _ = call("--help")
    assert status == 0
    for command in ("run", "check", "predict", "serve", "verify", "report", "benchmark", "doctor"):
        assert command in out
        status, text, _ = call(command, "--help")
        assert status == 0
        assert f"bothways {command}" in text.partition("xample")[2]


def test_without_arguments_there_is_help_and_the_version_is_known(call, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bothways"])
    assert "Commands" in call()[1]
    assert call("--version")[:2] == (0, "bothways 0.1.0\n")


def test_check_says_what_each_stage_will_do(tmp_path, call):
    status, out, err = call("check", write_recipe(tmp_path))
    assert (status, err) == (0, "")
    said = f"data: {tmp_path / 'rows.jsonl'}: JSON lines, utf-8\n"
    assert out == said + "teacher: finetune: 6 steps, batch 8 = micro 8 × processes 1 × accumulation 1\n"


# Bundles.


@pytest.mark.parametrize("command", [["predict", "a film"], ["verify"], ["serve", "--http-port", "0", "--grpc-port", "0"]])
@pytest.mark.parametrize("name", ["models/tiny_core/1/model.onnx", "tokenizer/tokenizer.json", "golden.jsonl"])
def test_a_bundle_with_one_flipped_byte_is_refused(bundle, tmp_path, call, command, name):
    copy = copy_bundle(bundle, tmp_path / "copy")
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    status, out, err = call(command[0], copy, *command[1:])
    assert_one_line(status, err, name)
    assert out == ""


def test_verify_says_when_the_bundle_was_exported_on_another_class_of_cpu(bundle, call, monkeypatch):
    assert "exported on" not in call("verify", bundle)[1]
    monkeypatch.setattr("export.serving.bundle.instructions", lambda: ["AVX1"])
    out = call("verify", bundle)[1]
    assert "exported on a CPU with " in out and "this one has AVX1" in out
    assert json.loads(call("verify", bundle, "--json")[1])["instructions"]["here"] == ["AVX1"]


def test_verify_accepts_only_the_identity_that_was_asked_for(bundle, call):
    identity = json.loads(call("verify", bundle, "--json")[1])["identity"]
    assert call("verify", bundle, "--sha256", identity)[0] == 0
    status, _, err = call("verify", bundle, "--sha256", "0" * 64)
    assert_one_line(status, err, identity, "another bundle")


def test_a_port_in_use_is_one_line(bundle, call):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, err = call("serve", bundle, "--http-port", port, "--grpc-port", 0)
    assert_one_line(status, err, str(port), "in use")


def test_a_run_directory_given_for_a_bundle_leads_to_the_bundle(bundle, tmp_path, call):
    copy_bundle(bundle, tmp_path / "run" / "engine")
    status, _, err = call("predict", tmp_path / "run", "a film")
    assert_one_line(status, err, f"not a bundle: did you mean {tmp_path / 'run' / 'engine'}?")


def test_texts_get_a_label_a_score_and_themselves(bundle, call):
    status, out, err = call("predict", bundle, *TEXTS[:3])
    assert (status, err) == (0, "")
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[2] for line in lines] == TEXTS[:3]
    assert all(line[0] in LABELS and 1 / 3 <= float(line[1]) <= 1 for line in lines)


def test_json_has_the_row_and_all_scores_that_add_up(bundle, call):
    _, out, _ = call("predict", bundle, "a good film", "--json")
    record = json.loads(out)
    assert record["input"] == {"text": "a good film"}
    assert record["label"] == max(record["scores"], key=record["scores"].get)
    assert record["score"] == record["scores"][record["label"]]
    assert sum(record["scores"].values()) == pytest.approx(1, abs=1e-6)


def test_lines_of_standard_input_are_predicted_in_order(bundle, call, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*TEXTS, "", "  "])))
    status, out, _ = call("predict", bundle)
    assert status == 0
    assert [line.split("\t")[2] for line in out.splitlines()] == TEXTS


def test_a_file_of_rows_becomes_a_file_of_predictions(bundle, tmp_path, call, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 3)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text, "id": number} for number, text in enumerate(TEXTS)])
    target = tmp_path / "out.jsonl"
    assert call("predict", bundle, "--input", rows, "--output", target) == (0, "", "")
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["input"]["id"] for record in records] == list(range(len(TEXTS)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a film"}\n{"text": "a fi\n', "rows.jsonl:2: not valid JSON"),
        ('{"text": "a film"}\n{"body": "a film"}\n', "rows.jsonl:2: no text in column 'text'"),
        ('{"text": "a film"}\n{"text": ""}\n', "rows.jsonl:2: no text in column 'text'"),
        ("\n", "rows.jsonl: no rows"),
    ],
)
def test_a_bad_row_is_named_before_anything_is_written(bundle, tmp_path, call, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "out.jsonl").write_text("before")
    status, out, err = call("predict", bundle, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
    assert_one_line(status, err, message)
    assert out == ""
    assert (tmp_path / "out.jsonl").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


def test_other_mistakes_with_files_are_one_line(bundle, tmp_path, call):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film"}])
    assert_one_line(*call("predict", bundle, "--input", tmp_path / "no.jsonl")[::2], "no.jsonl: no such file")
    assert_one_line(*call("predict", bundle, "a film", "--input", rows)[::2], "give either texts or --input")
    assert_one_line(
        *call("predict", bundle, "a film", "--with", "context=b")[::2], "this bundle reads text (its texts have no other input)"
    )
    target = tmp_path / "nowhere" / "out.jsonl"
    assert_one_line(*call("predict", bundle, "--input", rows, "--output", target)[::2], "its directory does not exist")


def test_a_file_of_rows_becomes_a_table_of_chosen_fields(bundle, tmp_path, call):
    source = write_rows(tmp_path / "rows.jsonl", [{"id": f"a{number}", "text": text} for number, text in enumerate(TEXTS)])
    table = tmp_path / "out.tsv"
    options = ["--input", source, "--output", table, "--fields", "id,prediction=label,p=score", "--rows", len(TEXTS)]
    assert call("predict", bundle, *options)[:2] == (0, "")
    header, *lines = [line.split("\t") for line in table.read_text().splitlines()]
    assert header == ["id", "prediction", "p"]
    assert [line[0] for line in lines] == [f"a{number}" for number in range(len(TEXTS))]
    assert {line[1] for line in lines} <= set(LABELS)
    assert all(1 / 3 <= float(line[2]) <= 1 for line in lines)
    status, _, err = call("predict", bundle, *options[:-1], 9)
    assert_one_line(status, err, "8 rows, and --rows says 9")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_while_predicting_is_one_line(bundle, tmp_path, call, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a film"}])
    original = Path.open

    def full(self, *arguments, **named):
        return original(Path("/dev/full") if self.suffix == ".tmp" else self, *arguments, **named)

    monkeypatch.setattr(Path, "open", full)
    status, _, err = call("predict", bundle, "--input", rows, "--output", tmp_path / "out.jsonl")
    assert_one_line(status, err, "disk full")
    assert not (tmp_path / "out.jsonl").exists()


def test_an_interrupt_is_130_without_a_traceback(call, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.doctor.examine", interrupted)
    status, out, err = call("doctor")
    assert (status, out) == (130, "")
    assert "Traceback" not in err


# The doctor.


def test_the_doctor_examines_everything_for_machines_and_people(call):
    status, out, err = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert (status, err) == (0, "")
    assert {
        "Python",
        "torch",
        "GPUs",
        "vector instructions",
        "bf16 training",
        "ONNX Runtime",
        "fast int8",
        "serving",
        "Slurm",
        "loopback",
    } <= set(findings)
    assert findings["loopback"]["works"]
    status, out, _ = call("doctor")
    assert status == 0
    assert all(name in out for name in findings)


def test_the_doctor_survives_a_broken_machine(call, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("driver mismatch [CUDA]")

    monkeypatch.setattr("launch.doctor.cores", broken)
    monkeypatch.setattr("launch.doctor.gpus", broken)
    status, out, _ = call("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert status == 0
    assert findings["memory"] == {
        "name": "memory",
        "works": False,
        "says": "could not be examined: RuntimeError: driver mismatch [CUDA]",
        "fix": "",
    }
    assert call("doctor")[0] == 0


def test_the_doctor_finds_locks_of_killed_builds_and_only_those(call, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr("launch.operators.STALE_SECONDS", -1.0)
    findings = {finding["name"]: finding for finding in json.loads(call("doctor", "--json")[1])}
    assert findings["stale build locks"]["fix"] == f"rm {lock}"
    monkeypatch.chdir(lock.parent)
    findings = {finding["name"]: finding for finding in json.loads(call("doctor", "--json")[1])}
    assert findings["stale build locks"]["works"]
