"""A step whose loss or gradient is bad stops the run, is skipped, or sends it back: as the recipe says, and bounded."""

import json
import math

import pytest
import torch

from engine.data.rows import LabelledBatches
from engine.errors import UserError
from engine.tasks.classification import Task
from engine.training import loop
from tests.recipes import finetune_section, read_weights, run_here, train_section, write_recipe

BAD = 5
"""0-based step whose data are bad."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    train = train_section(steps=10, keep="last", evaluate_every=2, checkpoint_every=2)
    return write_recipe(tmp_path_factory.mktemp("bad"), {"teacher": {"finetune": finetune_section(train=train)}})


def train(recipe, runs, action, *overrides, limit=3):
    policy = f"teacher.train.bad_steps={{action: {action}, limit: {limit}}}"
    return run_here(recipe, "teacher", runs, policy, *overrides)


def events(stage, key):
    lines = (stage.directory / "history.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


@pytest.fixture
def poisoned(monkeypatch):
    """Returns a function that makes the loss on the data of some steps what `poison` makes of it."""

    def apply(poison, steps=(BAD,)):
        at, loss, marked = loop.Fit._step, Task.loss, []

        def step(self, state):
            marked[:] = [state.step + state.data_offset in steps]
            try:
                return at(self, state)
            finally:
                marked[:] = [False]

        def poisonous(self, model, batch):
            total, count = loss(self, model, batch)
            return (poison(total), count) if any(marked) else (total, count)

        monkeypatch.setattr(loop.Fit, "_step", step)
        monkeypatch.setattr(Task, "loss", poisonous)

    return apply


def finite_with_nan_gradient(total):
    return total + (total * 0).sqrt() * 0


POISONS = {
    "loss": lambda total: total * math.nan,
    "loss alone": lambda total: total + math.inf,  # its gradient is finite
    "gradient": finite_with_nan_gradient,
}
SPIKE = {"spike": lambda total: total * 100}


@pytest.mark.parametrize("poison", POISONS)
def test_it_stops_by_default_and_the_checkpoint_is_intact(recipe, tmp_path, poisoned, poison):
    poisoned(POISONS[poison])
    with pytest.raises(
        UserError, match=rf"step {BAD + 1}: the (loss|gradient norm) is not finite: .* checkpoint of step 4 is intact"
    ):
        train(recipe, tmp_path, "stop")


@pytest.mark.parametrize("poison", POISONS | SPIKE)
def test_a_skipped_step_leaves_the_weights_and_the_optimizer_as_they_were(recipe, tmp_path, poisoned, monkeypatch, poison):
    monkeypatch.setattr(loop, "SPIKE_WINDOW", 3)
    poisoned((POISONS | SPIKE)[poison])
    states, step = [], loop.Trainer.step

    def watched(self, batches, number, *rest):
        before = self.snapshot(tmp_path)
        result = step(self, batches, number, *rest)
        states.append((before, self.snapshot(tmp_path)))
        return result

    monkeypatch.setattr(loop.Trainer, "step", watched)
    stage = train(recipe, tmp_path, "skip", "teacher.train.bad_steps.spike_factor=20")
    (_, before), (_, after) = (next(iter(state.items())) for state in states[BAD])
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    torch.testing.assert_close(before["optimizer"]["state"], after["optimizer"]["state"], rtol=0, atol=0)
    (_, before), (_, after) = (next(iter(state.items())) for state in states[BAD + 1])
    assert any(not torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    assert [record["step"] for record in events(stage, "skipped")] == [BAD + 1]


@pytest.mark.parametrize("poison", POISONS)
def test_after_a_rollback_it_ends_as_if_the_bad_data_had_never_been_there(recipe, tmp_path, poisoned, monkeypatch, poison):
    with monkeypatch.context() as patched:
        step = loop.Fit._step

        def without(self, state):
            # The checkpoint before is of step 4: the data of steps 4 and 5 are left out.
            state.data_offset = 2 if state.step >= 4 else 0
            return step(self, state)

        patched.setattr(loop.Fit, "_step", without)
        clean = train(recipe, tmp_path / "clean", "stop")
    poisoned(POISONS[poison])
    stage = train(recipe, tmp_path / "bad", "rollback")
    ours, theirs = read_weights(stage.directory), read_weights(clean.directory)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    (event,) = events(stage, "rolled_back")
    assert (event["step"], event["from_step"]) == (4, BAD + 1)
    validations = [record["step"] for record in events(stage, "validation")]
    assert validations == sorted(set(validations))


def test_a_step_without_a_valid_target_stops_the_run_and_says_where_to_look(recipe, tmp_path, monkeypatch):
    at = LabelledBatches.at

    def without_targets(self, step, *rest):
        parts = at(self, step, *rest)
        return [part | {"count": 0} for part in parts] if step == BAD else parts

    monkeypatch.setattr(LabelledBatches, "at", without_targets)
    with pytest.raises(UserError, match=f"step {BAD + 1} has no valid target: .* look at the data"):
        train(recipe, tmp_path, "skip")


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_bad_steps_are_bounded(recipe, tmp_path, poisoned, action):
    poisoned(POISONS["loss"], steps=range(BAD, 100))
    with pytest.raises(UserError, match=r"train\.bad_steps\.limit=2 is reached"):
        train(recipe, tmp_path, action, limit=2)


def test_a_spike_is_measured_against_the_median_of_the_steps_before(recipe, tmp_path, poisoned, monkeypatch):
    monkeypatch.setattr(loop, "SPIKE_WINDOW", 3)
    poisoned(SPIKE["spike"], steps=(1, BAD))
    stage = train(recipe, tmp_path, "skip", "teacher.train.bad_steps.spike_factor=20")
    # At step 1 there is nothing yet to measure against.
    (event,) = events(stage, "skipped")
    assert event["step"] == BAD + 1
    assert "the median of the 3 steps before" in event["skipped"]
