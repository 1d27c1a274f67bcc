"""Low-rank factorisation: the best product of a rank, in a model that is saved, loaded, trained and exported like any other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.errors import UserError
from engine.evaluate import torch_run
from engine.models import load_model
from engine.models.factors import rank_of, split
from engine.models.families import STRUCTURE_KEY
from engine.models.structure import factorize, keep_layers, shrink
from export.compress.factorize import FactorizeConfig
from export.engines.graph import export_onnx, merge_projections, weight_matmuls
from export.engines.ort import OrtEngine
from tests.recipes import finetune_section, read_weights, run_here, train_section, write_recipe
from tests.unit.models import GRAPH, classification_task, tiny_classifier

HEAD = "AutoModelForSequenceClassification"
IDS = torch.tensor([[2, 5, 9, 11, 3], [2, 7, 6, 3, 0]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=(IDS > 0).long()).logits


@given(st.integers(2, 12), st.integers(2, 12), st.data())
def test_the_product_is_the_best_of_its_rank(outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    matrix = torch.from_numpy(np.random.default_rng(outputs * 100 + inputs).standard_normal((outputs, inputs)))
    left, right = split(matrix, rank)
    assert left.shape == (outputs, rank) and right.shape == (rank, inputs)
    lost = torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt()
    assert torch.linalg.norm(left @ right - matrix) == pytest.approx(float(lost), abs=1e-9)


def test_a_share_takes_the_smallest_rank_that_keeps_it():
    singular = torch.tensor([2.0, 1.0, 1.0, 0.0])  # squares 4, 1, 1, 0: shares 0.667, 0.833, 1
    assert [rank_of(singular, share, 100, 100) for share in (0.5, 0.66, 0.7, 0.83, 0.9)] == [1, 1, 2, 2, 3]


def test_a_matrix_that_two_factors_would_not_make_smaller_is_left_alone():
    assert rank_of(torch.ones(8), 4, 8, 8) is None and rank_of(torch.ones(8), 3, 8, 8) == 3
    model = tiny_classifier()
    found = factorize(model, 31, None, None)
    assert all(factor.rank is None for factor in found) and getattr(model.config, STRUCTURE_KEY, None) is None


def test_a_model_of_low_rank_computes_the_same_with_fewer_parameters():
    model = tiny_classifier(initializer_range=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("encoder" in name or "word_embeddings" in name):
                parameter.copy_(torch.randn(len(parameter), 4) @ torch.randn(4, parameter.shape[1]) / 8)
    expected, parameters = logits(model), model.num_parameters()
    found = factorize(model, 4, 0.999999, 4)
    assert {factor.rank for factor in found} == {4} and len(found) == 2 * 6 + 1
    assert all(factor.energy == pytest.approx(1) for factor in found)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert model.num_parameters() < 0.6 * parameters


@pytest.fixture
def factorized():
    model = tiny_classifier(initializer_range=0.2)
    shrink(model, [[0, 2], [1, 3]], [range(40), range(30)])
    factorize(model, 6, 5, 7)
    return model


def test_it_is_saved_and_loaded_after_pruning_and_without_some_layers(factorized, tmp_path):
    factorized.save_pretrained(tmp_path / "all")
    torch.testing.assert_close(logits(load_model(tmp_path / "all", HEAD).eval()), logits(factorized), rtol=1e-5, atol=1e-6)
    keep_layers(factorized, [1])
    factorized.save_pretrained(tmp_path / "one")
    torch.testing.assert_close(logits(load_model(tmp_path / "one", HEAD).eval()), logits(factorized), rtol=1e-5, atol=1e-6)


def test_factorised_matrices_are_neither_pruned_nor_factorised_again(factorized):
    with pytest.raises(UserError, match="prune first, factorise afterwards"):
        shrink(factorized, [[0], [0]], [range(4), range(4)])
    with pytest.raises(UserError, match="factorised already"):
        factorize(factorized, 2, None, None)


def test_its_graph_gives_its_logits_and_both_factors_are_products_with_weights(factorized, tmp_path):
    task = classification_task(tmp_path / "t", 16, ["a", "b"])
    graph = export_onnx(factorized, GRAPH)
    merge_projections(graph)
    arrays = task.answers.prepare([{"text": "a good film"}, {"text": "the plot was very dull"}])
    given = OrtEngine(graph.SerializeToString()).run(arrays)["logits"]
    np.testing.assert_allclose(given, torch_run(factorized, task)("model", arrays)["logits"], atol=2e-5)
    assert len(weight_matmuls(graph)) >= 2 * (6 * 2 - 2) + 1  # the first factors of query, key and value are merged


def test_nothing_to_factorize_is_refused():
    common = {"model": "m", "task": {"type": "classification"}, "data": {"train": "rows.csv"}}
    with pytest.raises(ValidationError, match="otherwise nothing is factorised"):
        FactorizeConfig.model_validate(common)
    assert FactorizeConfig.model_validate({**common, "ffn": "90%"}).ffn == 0.9
    assert FactorizeConfig.model_validate({**common, "ffn": 64}).ffn == 64


def test_a_stage_factorises_and_distillation_recovers_what_it_made(tmp_path):
    train = train_section(steps=4)
    stages = {
        "teacher": {"finetune": finetune_section(train=train)},
        "thin": {"factorize": {"model": "teacher", "attention": 6, "ffn": "60%", "embeddings": 8}},
        "recovered": {"distill": {"teacher": "teacher", "student": {"model": "thin"}, "train": train}},
    }
    recipe = write_recipe(tmp_path, stages)
    made = {name: run_here(recipe, name, tmp_path / "runs").directory for name in stages}
    thin, recovered = read_weights(made["thin"]), read_weights(made["recovered"])
    assert thin.keys() == recovered.keys() and "bert.embeddings.word_embeddings.1.weight" in thin
    assert any(not torch.equal(thin[name], recovered[name]) for name in thin)
