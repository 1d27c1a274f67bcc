"""Pruned structures: what leaves the model leaves nothing behind, and what stays is saved and loaded like any model."""

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.models import load_model, size_of
from engine.models.families import STRUCTURE_KEY
from engine.models.structure import keep_layers, layers_of, shrink
from export.compress.prune import PruneConfig, importance, strongest
from tests.recipes import finetune_section, ragged_rows, run_here, write_model, write_recipe
from tests.unit.models import classification_task, tiny_classifier

IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0]])
MASK = (IDS != 0).long()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def test_shrinking_equals_silencing_the_outputs_of_what_was_removed():
    silenced, shrunk = tiny_classifier(), tiny_classifier()
    heads, neurons = [[0, 3], [1, 2]], [[1, 5, 9], [60, 61, 63]]
    for layer, kept_heads, kept_neurons in zip(layers_of(silenced), heads, neurons, strict=True):
        with torch.no_grad():
            columns = layer.part("output").weight.unflatten(1, (4, 8))
            columns[:, [head for head in range(4) if head not in kept_heads]] = 0
            layer.part("down").weight[:, [n for n in range(64) if n not in kept_neurons]] = 0
    shrink(shrunk, heads, neurons)
    torch.testing.assert_close(logits(shrunk), logits(silenced))
    assert size_of(shrunk)["parameters"] < size_of(silenced)["parameters"]
    assert layers_of(shrunk)[0].part("query").weight.shape == (16, 32)
    assert layers_of(shrunk)[1].part("up").weight.shape == (3, 32)


def test_a_shrunk_model_survives_saving_and_loading_and_shrinks_again(tmp_path):
    model = tiny_classifier()
    shrink(model, [[0, 2], [1, 3]], [range(10), range(20, 30)])
    model.save_pretrained(tmp_path / "once")
    loaded = load_model(tmp_path / "once", "AutoModelForSequenceClassification")
    assert torch.equal(logits(loaded.eval()), logits(model))
    shrink(loaded, [[1], [0]], [range(5), range(5)])
    loaded.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load_model(tmp_path / "twice", "AutoModelForSequenceClassification").eval()), logits(loaded))


def test_layers_of_a_shrunk_model_can_be_dropped(tmp_path):
    model = tiny_classifier()
    shrink(model, [[0, 2], [1]], [range(10), range(7)])
    keep_layers(model, [1])
    assert getattr(model.config, STRUCTURE_KEY) == {"heads": [1], "neurons": [7]}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path, "AutoModelForSequenceClassification").eval()), logits(model))


def test_weights_that_do_not_fit_the_structure_are_refused(tmp_path):
    model = tiny_classifier()
    shrink(model, [[0], [0]], [range(4), range(4)])
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace(STRUCTURE_KEY, "something_else"))
    with pytest.raises(UserError, match="not of one model"):
        load_model(tmp_path, "AutoModelForSequenceClassification")


def test_a_head_and_a_neuron_without_effect_are_the_least_important(tmp_path):
    task = classification_task(tmp_path)
    model = tiny_classifier(initializer_range=0.2)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.part("output").weight[:, 8:16] = 0  # head 1
            layer.part("down").weight[:, 17] = 0
    examples = task.encode([{**row, "label": str(row["label"])} for row in ragged_rows(50)])
    heads, neurons = importance(model, task, examples)
    assert all(layer.argmin() == 1 and layer[1] == 0 for layer in heads)
    assert all(layer[17] == 0 and layer.sum() > 0 for layer in neurons)
    assert all(1 not in kept for kept in strongest(heads, 3, "heads"))
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_importance_is_the_first_order_change_of_the_loss(tmp_path):
    task = classification_task(tmp_path)
    model = tiny_classifier(initializer_range=0.2)
    examples = task.encode([{"text": "a good film", "label": "1"}])
    _, neurons = importance(model, task, examples)
    batch, step = task.collate(examples), 1e-3
    layer = layers_of(model)[1]
    chosen = int(neurons[1].argmax())
    with torch.no_grad():
        before, _ = task.loss(model, batch)
        layer.part("down").weight[:, chosen] *= 1 - step
        after, _ = task.loss(model, batch)
    assert float(neurons[1][chosen]) == pytest.approx(abs(float(after - before)) / step, rel=0.05)


def test_more_heads_than_there_are_is_refused():
    with pytest.raises(UserError, match="heads=5: the model has only 4"):
        strongest(torch.ones(2, 4), 5, "heads")


def test_pruning_nothing_is_refused():
    with pytest.raises(ValueError, match="give heads, neurons or both"):
        PruneConfig.model_validate({"model": "m", "task": {"type": "classification"}, "data": {"train": "rows.jsonl"}})


def test_the_prune_stage_hands_on_a_smaller_model_with_its_scores(tmp_path):
    write_model(tmp_path / "model", id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1})
    teacher = finetune_section()
    section = {"model": "model", "heads": 2, "neurons": 16, "max_length": 32, "examples": 16}
    recipe = write_recipe(tmp_path, {"slim": {"prune": {**section, "task": teacher["task"], "data": teacher["data"]}}})
    stage = run_here(recipe, "slim", tmp_path / "runs")
    record = (stage.directory / "stage.json").read_text()
    assert '"test"' in record and '"kept"' in record
    layers = layers_of(load_model(stage.directory, "AutoModelForSequenceClassification"))
    assert [(layer.heads, layer.neurons) for layer in layers] == [(2, 16), (2, 16)]
    assert len((stage.directory / "predictions.jsonl").read_text().splitlines()) > 0
    assert np.isfinite(size_of(load_model(stage.directory, "AutoModelForSequenceClassification"))["weight_bytes"])
