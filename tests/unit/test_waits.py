"""How often a step asks the device for a value: a GPU runs dry each time, until its next kernels come."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import load_recipe
from engine.data.packed import PackedBatches
from engine.objectives import clm
from engine.training.processes import Processes
from engine.training.trainer import Trainer
from launch.recipe import load_stages
from tests.recipes import write_recipe
from tests.unit import test_pairs, test_plm, test_rtd
from tests.unit.test_packed_families import model_of, packed_of
from tests.unit.test_pairs import corpus  # noqa: F401

ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "nonzero_numpy"}


class Waits(TorchDispatchMode):
    """Counts operators whose result, or the shape of it, the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        name = operator.overloadpacket.__name__
        masks = [index for index in (arguments[1] or []) if index is not None] if name in ("index", "index_put_") else []
        if name in ASKING or any(index.dtype == torch.bool for index in masks):
            self.found[name] += 1
        return operator(*arguments, **(options or {}))


@pytest.fixture
def step(tmp_path):
    """Returns a function that learns one batch of an objective, and gives what the step waited for."""
    stage = load_stages(load_recipe(write_recipe(tmp_path)))[0]

    def run(model, objective, batches):
        trainer = Trainer(Processes(stage.config, stage.recipe), model, objective.loss)
        batch = batches.collate(0, np.arange(2))
        with Waits() as waits:
            loss, norm = trainer.step([batch], 0, lambda depth: 1e-3, lambda: torch.tensor(float(batch["count"])))
        assert loss > 0 and norm > 0
        return waits.found

    return run


def test_the_counting_counts():
    with Waits() as waits:
        values = torch.tensor([1.0, -1.0])
        values[values > 0].sum().item()
        float(values.sum())
    assert sum(waits.found.values()) >= 3


@pytest.mark.parametrize("kind", ["nsp", "sop"])
def test_masked_tokens_and_pairs(step, corpus, kind):  # noqa: F811
    module = test_pairs.MODULES[kind]
    objective = module.Objective(module.Config(mask=0.3), test_pairs.VOCABULARY, test_pairs.MASK, [0, 1, 2, 3, 4])
    batches = PackedBatches({"": [corpus]}, objective, test_pairs.Tokenizer, test_pairs.LENGTH, 8, 1)
    assert not step(test_pairs.model_of(kind), objective, batches)


def test_the_next_token(step):
    batches = packed_of([list(range(10, 30)), list(range(30, 50))], clm.Objective(), 24)
    assert not step(model_of("gpt2"), batches.objective, batches)


def test_replaced_tokens(step):
    chosen = test_rtd.objective()
    assert not step(test_rtd.model_of(), chosen, test_rtd.batches_of(chosen))


def test_tokens_in_any_order(step):
    objective = test_plm.objective(test_plm.Tokenizer())
    found = step(test_plm.model_of(), objective, test_plm.batches_of(test_plm.Tokenizer(), objective))
    assert found == {"_local_scalar_dense": 4}, "two one-hot encodings, which torch checks on CPUs alone"
