"""Models that are no encoders like BERT go through the stages, from a file of rows to a bundle that verifies itself."""

import json

import pytest

from engine.stages.stage import read_stage
from export.serving.bundle import verify_bundle
from tests.families import write_family
from tests.recipes import finetune_section, run_here, train_section, write_recipe

TRAIN = train_section(steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "t5", "deberta-v2"])
def test_a_family_goes_from_rows_to_a_bundle(tmp_path, family):
    write_family(tmp_path / "model", family)
    stages = {
        "teacher": {"finetune": finetune_section(train=TRAIN)},
        "small": {"distill": {"teacher": "teacher", "student": {"layers": 2}, "hidden": 1.0, "attention": 1.0, "train": TRAIN}},
        "slim": {"prune": {"model": "small", "heads": 2, "neurons": 32, "examples": 16}},
        "int8": {"quantize": {"model": "slim"}},
        "engine": {"export": {"model": "int8", "rounds": 5, "gates": {"agreement": "85%"}}},
    }
    recipe = write_recipe(tmp_path, stages)
    made = {name: run_here(recipe, name, tmp_path / "runs").directory for name in stages}
    assert json.loads((made["slim"] / "config.json").read_text())["bothways_structure"]["heads"][0] == 2
    parity = read_stage(made["engine"])["parity"]
    assert parity["batch_difference"] < 1e-3 and parity["padding_difference"] < 1e-3
    verify_bundle(made["engine"])
