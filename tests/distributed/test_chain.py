"""Every kind of stage in one recipe, from text to a bundle that answers, by the commands that a user types."""

import copy
import json
import subprocess
import sys

import pytest

from engine.stages.stage import SHARED, read_stage
from tests.distributed.conftest import ROOT, Bothways, succeed
from tests.recipes import ragged_rows, write_recipe, write_rows
from tests.unit.test_recipe import CHAIN


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(recipe, run directory) after one run."""
    directory = tmp_path_factory.mktemp("chain")
    write_rows(directory / "rows.jsonl", ragged_rows(300))
    stages = copy.deepcopy(CHAIN)
    for body in stages.values():
        for section in body.values():
            section["data"] = {"train": "rows.jsonl", "validation": "20%", "test": "20%"}
    stages["text"]["corpus"]["data"].pop("test")
    stages["base"]["pretrain"]["data"] = None
    stages["teacher"]["finetune"]["train"] |= {"steps": 60, "learning_rate": 3e-3, "evaluate_every": 30}
    stages["engine"]["export"]["threads"] = 1
    recipe = write_recipe(directory, stages)
    out = succeed(Bothways(recipe, directory / "runs"))
    assert f"report: {directory / 'runs/tiny/report.html'}" in out
    return recipe, directory / "runs" / "tiny"


def bothways(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_stage_has_finished_and_a_second_run_skips_them_all(chain):
    recipe, run = chain
    assert all(read_stage(run / name) for name in CHAIN)
    before = {name: (run / name / "stage.json").read_bytes() for name in CHAIN}
    out = succeed(Bothways(recipe, run.parent))
    assert out.count("skipped, unchanged") == len(CHAIN)
    assert not (run / SHARED).exists()
    assert {name: (run / name / "stage.json").read_bytes() for name in CHAIN} == before


def test_each_stage_names_the_bytes_that_it_read(chain):
    _, run = chain
    for name, body in CHAIN.items():
        inputs = read_stage(run / name)["inputs"]
        read = "corpus[0].corpus" if name == "base" else "data.train.path"
        assert inputs[read]["sha256"]
        for key in ("model", "teacher"):
            section = next(iter(body.values()))
            if isinstance(section.get(key), str) and section[key] in CHAIN:
                assert inputs[key]["reference"] == section[key]
                assert inputs[key]["sha256"]


def test_the_bundle_verifies_and_predicts_and_the_report_speaks_json(chain):
    _, run = chain
    assert "intact" in bothways("verify", run / "engine")
    label, score, text = bothways("predict", run / "engine", "good great warm").strip().split("\t")
    assert label in ("0", "1")
    assert 0.5 <= float(score) <= 1
    assert text == "good great warm"
    report = json.loads(bothways("report", run, "--json"))
    assert [stage["name"] for stage in report["stages"]] == list(CHAIN)
    assert set(report["comparison"]) >= {"accuracy_drop_points", "speedup_vs_torch_fp32", "speedup_vs_onnx_fp32"}
