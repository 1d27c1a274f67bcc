"""The family table: what a row says is so, and an architecture without one is told in one line."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

from engine.errors import UserError
from engine.models import ScratchConfig, positions_of, set_dropout
from engine.models.families import FAMILIES, family_of
from engine.models.structure import encoder_layers, keep_layers, shrink

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "embedding_size": 32,
    "input_embedding_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
IDS = torch.tensor([[2, 10, 11, 12, 3]])


def tiny(model_type, auto=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(model_type, **SHAPE), attn_implementation="eager").eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("model_type", [name for name, row in FAMILIES.items() if row.layers])
def test_layers_heads_and_neurons_lie_where_the_row_says(model_type):
    model = tiny(model_type)
    assert [(layer.heads, layer.neurons) for layer in encoder_layers(model)] == [(4, 64)] * 3
    whole = logits(model)
    keep_layers(model, [0, 2])
    shrink(model, [[0, 3], [1]], [range(40), range(30)])
    assert [(layer.heads, layer.neurons) for layer in encoder_layers(model)] == [(2, 40), (1, 30)]
    assert model.config.num_hidden_layers == 2
    assert logits(model).shape == whole.shape and not torch.equal(logits(model), whole)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_longest_text_that_the_row_allows_fits_and_no_longer_one(model_type):
    model = tiny(model_type)
    positions = positions_of(model.config.to_dict())
    logits(model, torch.full((1, positions), 7))
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, torch.full((1, positions + 1), 7))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_dropout_is_left_in_the_configuration(model_type):
    model = tiny(model_type)
    set_dropout(model, 0.0)
    assert {key: value for key, value in model.config.to_dict().items() if "dropout" in key and value} == {}


@pytest.mark.parametrize("model_type", [name for name, row in FAMILIES.items() if row.packed])
def test_packed_documents_do_not_see_each_other(model_type):
    from engine.models.attention import packed_mask

    model = tiny(model_type, AutoModelForMaskedLM)
    segments, positions = torch.tensor([[1, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 0, 1]])

    def hidden(ids):
        mask = packed_mask(segments, model.dtype)
        with torch.no_grad():
            return model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask)[0]

    other = IDS.clone()
    other[0, :3] = 20
    torch.testing.assert_close(hidden(IDS)[0, 3:], hidden(other)[0, 3:])
    assert model.get_submodule(family_of(model_type).vocabulary_head)(hidden(IDS)).shape == (1, 5, 64)


def test_an_architecture_without_a_row_is_one_line():
    model = tiny("mpnet")
    with pytest.raises(UserError, match="models of type 'mpnet' cannot be shrunk: where their layers lie is known for bert, "):
        encoder_layers(model)
    with pytest.raises(ValueError, match="models of type 'gpt2' take no packed rows: pretraining builds bert"):
        ScratchConfig(family="gpt2")
