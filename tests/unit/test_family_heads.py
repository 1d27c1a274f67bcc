"""Tags and spans of every family: which heads transformers has, and an engine that says what the model says."""

import numpy as np
import pytest
import torch
from transformers.models.auto import modeling_auto

from engine.evaluate import torch_run
from engine.models import load_tokenizer
from engine.models.families import FAMILIES, HEADS
from engine.models.fitting import load_fitting
from engine.tasks import REGISTRY
from export.engines.graph import export_graphs
from export.engines.ort import OrtEngine
from tests.families import write_family
from tests.recipes import ragged_rows
from tests.unit.test_family_chain import ALIKE

NAMES = {
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
TEXTS = [row["text"] for row in ragged_rows(12)]
ROWS = {
    "tagging": [{"text": text.split(), "label": ["B-x", *["O"] * (len(text.split()) - 1)]} for text in TEXTS],
    "question_answering": [
        {"question": "good film", "context": text, "answers": [{"text": text.split()[0], "answer_start": 0}]} for text in TEXTS
    ],
}
SPANS = ("bert", "roberta", "xlnet", "t5", "gpt2", "llama", "deberta-v2")
"""Whose heads for spans are tried every time: those of the others are like them."""
CASES = [
    pytest.param(
        task,
        family,
        marks=[pytest.mark.slow] if family in ALIKE or (task == "question_answering" and family not in SPANS) else [],
    )
    for task, operation in (("tagging", "tags"), ("question_answering", "spans"))
    for family, row in FAMILIES.items()
    if not row.why_not(operation)
]


@pytest.mark.parametrize("head", NAMES)
def test_the_table_knows_which_heads_transformers_has(head):
    lacking = {name for name in FAMILIES if name not in NAMES[head]} | {"fnet"}
    assert {name for name, row in FAMILIES.items() if row.why_not(HEADS[head])} == lacking


@pytest.mark.parametrize(("name", "family"), CASES)
def test_an_engine_gives_what_the_model_gives_with_and_without_neighbours(tmp_path, name, family):
    path, module, rows = write_family(tmp_path / "model", family), REGISTRY.module(name), ROWS[name]
    config = module.Config(type=name)
    task = module.Task(config, module.Task.learn(config, rows), load_tokenizer(path), 24)
    torch.manual_seed(0)
    model, _ = load_fitting(path, task, "eager")
    run = torch_run(model.eval(), task)
    (graph,) = export_graphs(model, task).values()
    engine = OrtEngine(graph.SerializeToString(), threads=1)
    together = task.answers.prepare(rows)
    expected, given = run("model", together), engine.run(together)
    assert given.keys() == expected.keys()
    # What stands on padding is nobody's.
    seen = together["attention_mask"].astype(bool)
    for output in (each for each in expected if each != "transitions"):
        np.testing.assert_allclose(given[output][seen], expected[output][seen], atol=2e-4)
    alone = task.answers.prepare(rows[:1])
    for output, values in engine.run(alone).items():
        if output != "transitions":
            there = seen[0] if values.shape[:1] == alone["attention_mask"].shape[:1] else slice(None)
            np.testing.assert_allclose(values[0][alone["attention_mask"][0] > 0], expected[output][0][there], atol=2e-4)
