"""One way, both ways, and between them: frozen layers, learning rates by layer, gradual unfreezing."""

import pytest
import torch
import transformers

from engine.errors import UserError
from engine.training.config import TrainConfig
from engine.training.optim import build_optimizer
from engine.training.schedule import Schedule
from engine.training.tuning import depth_of, freeze_below
from tests.unit.models import tiny_classifier


def config(**changes):
    return TrainConfig(**{"steps": 100, "warmup": 0.0, **changes})


def tiny(family, **changes):
    torch.manual_seed(0)
    names = {"vocab_size": 64, "pad_token_id": 0, **changes}
    return transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(family, **names))


BERT_LIKE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
FAMILIES = {
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "electra": {**BERT_LIKE, "embedding_size": 8},
    "deberta-v2": {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "modernbert": BERT_LIKE,
    "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
    "llama": {**BERT_LIKE, "bos_token_id": 1, "eos_token_id": 1},
    "xlnet": {"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_counts_layers_down_from_the_head_and_ends_with_the_embeddings(family):
    model = tiny(family, **FAMILIES[family])
    depths = depth_of(model)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    assert set(depths.values()) == {0, 1, 2, 3, 4}
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    assert tables and all(depths[f"{name}.weight"] == 4 for name in tables)
    for name, depth in depths.items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers and not name.startswith("classifier"):
            assert depth == 3 - numbers[0], name
        if name.startswith(("classifier", "score", "logits_proj")):
            assert depth == 0


def test_a_decoder_lies_above_its_encoder():
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = tiny(
        "bart", **shape, encoder_ffn_dim=16, decoder_ffn_dim=16, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2
    )
    depths = depth_of(model)
    assert [depths[f"model.decoder.layers.{index}.fc1.weight"] for index in range(3)] == [3, 2, 1]
    assert [depths[f"model.encoder.layers.{index}.fc1.weight"] for index in range(2)] == [5, 4]
    assert depths["model.shared.weight"] == 6 and depths["classification_head.dense.weight"] == 0


@pytest.mark.parametrize("layers", [0, 1, "all"])
def test_only_the_layers_that_are_asked_for_change(layers):
    model = tiny_classifier()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    freeze_below(model, layers)
    optimizer, _ = build_optimizer(model, config(learning_rate=0.1, layers=layers))
    model(torch.tensor([[2, 5, 6, 3]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    depths = depth_of(model)
    changed = {depths[name] for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(range(4 if layers == "all" else layers + 1))


def test_more_layers_than_there_are_is_one_line():
    with pytest.raises(UserError, match=r"train\.layers=3: the model has 2 layers"):
        freeze_below(tiny_classifier(), 3)


def test_groups_hold_every_trained_weight_once_by_depth_and_keep_decay_to_matrices():
    model = tiny_classifier()
    freeze_below(model, 1)
    optimizer, depths = build_optimizer(model, config(layer_decay=0.5, layers=1, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = depth_of(model)
    seen = []
    for group, depth in zip(optimizer.param_groups, depths, strict=True):
        assert {expected[names[id(parameter)]] for parameter in group["params"]} == {depth}
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}
        seen += [names[id(parameter)] for parameter in group["params"]]
    assert sorted(seen) == sorted(name for name, depth in expected.items() if depth <= 1)


def test_without_a_wish_there_are_the_two_groups_that_there_always_were():
    optimizer, depths = build_optimizer(tiny_classifier(), config())
    assert depths == [0, 0] and len(optimizer.param_groups) == 2


def test_a_layers_rate_is_that_of_the_layer_above_times_the_decay():
    schedule = Schedule.of(config(learning_rate=1.0, schedule="constant", layer_decay=0.5), 10, lowest=3)
    assert [schedule.at(7, depth) for depth in range(4)] == [1.0, 0.5, 0.25, 0.125]


def test_layers_join_from_the_top_evenly_over_the_share_that_is_given():
    schedule = Schedule.of(config(learning_rate=1.0, schedule="constant", unfreeze=0.4), 10, lowest=4)
    first = [next(step for step in range(100) if schedule.at(step, depth) > 0) for depth in range(5)]
    assert first == [0, 10, 20, 30, 40]
