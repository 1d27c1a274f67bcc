"""Activations that are computed again: the same losses, gradients and weights, with dropout drawn again too."""

import pytest
import torch

from engine.config import load_recipe
from engine.errors import UserError
from engine.models import checkpoint_activations, load_model
from engine.training.processes import Processes
from engine.training.trainer import Trainer
from launch.recipe import load_stages
from tests.recipes import finetune_section, pretrain_section, read_history, read_weights, run_here, train_section, write_recipe


@pytest.mark.parametrize("name", ["base", "teacher"])
def test_losses_gradients_and_weights_are_the_same_with_dropout_on(tmp_path, name):
    train = train_section(dropout=0.3)
    stages = {"base": {"pretrain": pretrain_section(train=train)}, "teacher": {"finetune": finetune_section(train=train)}}
    recipe = write_recipe(tmp_path, stages)
    plain = run_here(recipe, name, tmp_path / "plain").directory
    again = run_here(recipe, name, tmp_path / "again", f"{name}.train.gradient_checkpointing=true").directory
    assert read_history(plain) == read_history(again)
    ours, theirs = read_weights(plain), read_weights(again)
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    without = run_here(recipe, name, tmp_path / "without", f"{name}.train.dropout=0.0").directory
    assert read_history(without) != read_history(plain)


def test_layers_really_run_twice(tmp_path):
    stage = load_stages(load_recipe(write_recipe(tmp_path), ["teacher.train.gradient_checkpointing=true"]))[0]
    model = load_model(tmp_path / "model", "AutoModelForSequenceClassification")
    runs = []
    model.bert.encoder.layer[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return logits.sum(), torch.tensor(8)

    trainer = Trainer(Processes(stage.config, stage.recipe), model, loss)
    trainer.step([{"input_ids": torch.ones(8, 8, dtype=torch.int64)}], 0, lambda depth: 1e-3, lambda: torch.tensor(8.0))
    assert len(runs) == 2


def test_a_model_that_was_loaded_trains_with_its_dropout(tmp_path):
    stage = load_stages(load_recipe(write_recipe(tmp_path)))[0]
    model = load_model(tmp_path / "model", "AutoModelForSequenceClassification")
    assert not model.training  # transformers loads models for inference
    trainer = Trainer(Processes(stage.config, stage.recipe), model, lambda model, batch: None)
    assert all(module.training for module in trainer.model.modules())


def test_a_model_that_cannot_do_it_is_refused(tmp_path):
    model = load_model(write_recipe(tmp_path).parent / "model", "AutoModelForSequenceClassification")
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"train.gradient_checkpointing: models of type 'bert' cannot do that: turn it off"):
        checkpoint_activations(model)


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
def test_weights_that_were_saved_in_half_precision_are_trained_in_fp32(tmp_path, saved):
    path = write_recipe(tmp_path).parent / "model"
    load_model(path, "AutoModelForSequenceClassification").to(saved).save_pretrained(path)
    for random in (False, True):
        model = load_model(path, "AutoModelForSequenceClassification", random=random)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
