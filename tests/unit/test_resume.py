"""A training that is interrupted anywhere and run again ends with the bits of one that was not."""

import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import PREEMPTED, UserError
from engine.stages.stage import read_stage
from engine.training import checkpoint, loop
from tests.recipes import finetune_section, read_history, read_weights, run_here, train_section, write_recipe

STEPS = 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program handles it."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    # Weights that score better at some evaluations and worse at others, with dropout.
    train = train_section(steps=STEPS, learning_rate=2.5e-3, dropout=0.1, evaluate_every=1, checkpoint_every=2)
    return write_recipe(tmp_path_factory.mktemp("resume"), {"teacher": {"finetune": finetune_section(train=train)}})


def train(recipe, runs, *overrides):
    return run_here(recipe, "teacher", runs, "seed=17", *overrides)


def weights(stage):
    return read_weights(stage.directory)


def history(stage):
    return read_history(stage.directory)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return train(recipe, tmp_path_factory.mktemp("whole"))


def assert_same_end(stage, whole):
    ours, theirs = weights(stage), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history(stage) == history(whole)
    same = ("metrics", "steps", "best_step", "stopped", "parameters", "fingerprint")
    assert {key: read_stage(stage.directory)[key] for key in same} == {key: read_stage(whole.directory)[key] for key in same}
    assert not stage.partial.exists()


def test_the_best_weights_change_and_are_not_the_last_ones(whole):
    scores = [record["validation"]["accuracy"] for record in history(whole) if "validation" in record][1:]
    best = [score for index, score in enumerate(scores) if score > max(scores[:index], default=0)]
    assert len(best) >= 4
    assert best[-1] > scores[-1]


INSIDE = {
    "a step": (loop.Trainer, "step"),
    "an evaluation": (loop.Fit, "_evaluate"),
    "the save of weights": (loop.Fit, "_keep_weights"),
    "the save of a checkpoint": (checkpoint.Checkpoints, "save"),
    "the publication of weights or checkpoint": (loop, "publish"),
    "the publication of a checkpoint": (checkpoint, "publish"),
    "the removal of old weights": (loop, "step_numbers"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [3, *(pytest.param(call, marks=pytest.mark.slow) for call in (1, 2, 4))])
@pytest.mark.parametrize("place", INSIDE)
def test_killed_anywhere_it_ends_bit_equal(recipe, whole, tmp_path, monkeypatch, place, call, when):
    owner, name = INSIDE[place]
    original, calls = getattr(owner, name), []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == call and when == "before":
            raise Killed
        result = original(*arguments, **named)
        if len(calls) == call:
            raise Killed
        return result

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(Killed):
            train(recipe, tmp_path)
    assert_same_end(train(recipe, tmp_path), whole)


@pytest.mark.parametrize("optimizer", ["lamb", "muon", "stable_adamw"])
def test_killed_in_a_step_of_another_optimizer_it_ends_bit_equal(recipe, tmp_path, monkeypatch, optimizer):
    chosen = f"teacher.train.optimizer={optimizer}"
    original, calls = loop.Trainer.step, []

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == STEPS - 1:
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop.Trainer, "step", killed)
        train(recipe, tmp_path / "killed", chosen)
    assert_same_end(train(recipe, tmp_path / "killed", chosen), train(recipe, tmp_path / "whole", chosen))


def test_killed_before_the_finished_stage_is_renamed_into_place_it_ends_bit_equal(recipe, whole, tmp_path, monkeypatch):
    from pathlib import Path

    original = Path.rename

    def killed(self, target):
        if self.name == "output":
            raise Killed
        return original(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            train(recipe, tmp_path)
    assert_same_end(train(recipe, tmp_path), whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_its_weights(recipe, whole, tmp_path, capsys):
    checkpoints = kill_at(5, recipe, tmp_path)
    newest = checkpoints / f"step-{checkpoint.step_numbers(checkpoints)[-1]:08d}"
    state = newest / "replicated.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"\1")
    stage = train(recipe, tmp_path)
    assert f"checkpoint {newest.name} is damaged: passed over" in capsys.readouterr().out
    assert_same_end(stage, whole)


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(recipe, whole, tmp_path):
    """The newest one being damaged, an older step must be able to save, and its checkpoint must stay."""
    one = "teacher.train.keep_checkpoints=1"
    checkpoints = kill_at(7, recipe, tmp_path, one)
    (newest,) = checkpoint.step_numbers(checkpoints)
    (checkpoints / f"step-{newest:08d}/state.json").write_text("{")
    kill_at(3, recipe, tmp_path, one)
    assert checkpoint.step_numbers(checkpoints) == [2]
    assert (checkpoints / f"step-{newest:08d}.damaged").is_dir()
    ours, theirs = weights(train(recipe, tmp_path, one)), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_between_the_two_renames_of_a_checkpoint_it_goes_on_from_the_old_one(recipe, whole, tmp_path, capsys):
    checkpoints = kill_at(5, recipe, tmp_path)
    for step in checkpoint.step_numbers(checkpoints):
        path = checkpoints / f"step-{step:08d}"
        path.rename(path.with_name(path.name + ".old"))
    stage = train(recipe, tmp_path)
    assert "resuming after step 4" in capsys.readouterr().out
    assert_same_end(stage, whole)


def test_a_first_checkpoint_that_does_not_read_back_stops_the_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.Checkpoints, "_newest_intact", lambda self: None)
    with pytest.raises(UserError, match="does not read back as it was written: check the disk"):
        train(recipe, tmp_path)


def test_a_torn_last_line_of_the_history_is_dropped(recipe, whole, tmp_path):
    kill_at(3, recipe, tmp_path)
    with (tmp_path / "tiny/teacher.partial/history.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert_same_end(train(recipe, tmp_path), whole)


def stop_at(monkeypatch, step, action=None):
    original = loop.Trainer.step

    def stepped(self, batch, number, *rest):
        if number == step:
            if action is None:
                raise Killed
            action()
        return original(self, batch, number, *rest)

    monkeypatch.setattr(loop.Trainer, "step", stepped)


def kill_at(step, recipe, runs, *overrides):
    """Trains up to a step and is killed there; returns the directory of the checkpoints."""
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(Killed):
            train(recipe, runs, *overrides)
    return runs / "tiny/teacher.partial/checkpoints"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_and_the_next_run_ends_bit_equal(recipe, whole, tmp_path, monkeypatch, number):
    stop_at(monkeypatch, 2, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stop:
        train(recipe, tmp_path)
    assert stop.value.code == PREEMPTED
    monkeypatch.undo()
    stage = train(recipe, tmp_path)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(stage).items())


def test_a_signal_during_an_evaluation_stops_before_its_next_batch_and_the_next_run_makes_up_for_it(
    recipe, whole, tmp_path, monkeypatch
):
    original, finished = loop.Fit._evaluate, []

    def evaluate(self):
        if self.state.step == 3:
            signal.raise_signal(signal.SIGTERM)
        original(self)
        finished.append(self.state.step)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Fit, "_evaluate", evaluate)
        with pytest.raises(SystemExit) as stop:
            train(recipe, tmp_path)
    assert stop.value.code == PREEMPTED
    assert finished[-1] == 2
    assert checkpoint.step_numbers(tmp_path / "tiny/teacher.partial/checkpoints")[-1] == 3
    assert_same_end(train(recipe, tmp_path), whole)


@pytest.mark.parametrize("place", [(loop.Fit, "_rehearse"), (checkpoint.Checkpoints, "resume")])
def test_a_signal_before_the_first_step_stops_without_a_trace_in_the_result(recipe, whole, tmp_path, monkeypatch, place):
    owner, name = place
    original = getattr(owner, name)

    def signalled(*arguments):
        signal.raise_signal(signal.SIGUSR1)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled)
        with pytest.raises(SystemExit) as stop:
            train(recipe, tmp_path)
    assert stop.value.code == PREEMPTED
    assert_same_end(train(recipe, tmp_path), whole)


def test_a_signal_while_a_checkpoint_is_saved_stops_after_it(recipe, whole, tmp_path, monkeypatch):
    original = checkpoint.Checkpoints.save

    def save(self, trainer, state, then):
        if state.step == 4:
            signal.raise_signal(signal.SIGTERM)
        original(self, trainer, state, then)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", save)
        with pytest.raises(SystemExit):
            train(recipe, tmp_path)
    assert checkpoint.step_numbers(tmp_path / "tiny/teacher.partial/checkpoints")[-1] == 5
    stage = train(recipe, tmp_path)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(stage).items())


def test_training_goes_on_while_a_checkpoint_is_being_written(recipe, whole, tmp_path, monkeypatch):
    original, moved_on = checkpoint.publish, []

    def publish(source, target):
        step = int(target.name[5:])
        before = fits[0].state.step
        give_up = time.monotonic() + 30
        # The last one has nothing to overlap with; the first belongs to the rehearsal.
        while 0 < step < STEPS and fits[0].state.step == before and time.monotonic() < give_up:
            time.sleep(0.001)
        moved_on.append(fits[0].state.step > step or step in (0, STEPS))
        original(source, target)

    fits, init = [], loop.Fit.__init__
    monkeypatch.setattr(loop.Fit, "__init__", lambda self, *arguments: (init(self, *arguments), fits.append(self))[0])
    monkeypatch.setattr(checkpoint, "publish", publish)
    stage = train(recipe, tmp_path)
    assert len(moved_on) > 3
    assert all(moved_on)
    assert_same_end(stage, whole)


def test_handlers_are_given_back(recipe, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(recipe, tmp_path, "teacher.train.steps=1")
    assert signal.getsignal(signal.SIGTERM) is before


def test_early_stopping_counts_on_after_a_resume(recipe, tmp_path):
    overrides = ["teacher.train.steps=30", "teacher.train.early_stopping={patience: 3}"]
    whole = train(recipe, tmp_path / "whole", *overrides)
    record = read_stage(whole.directory)
    assert record["stopped"].startswith(f"early stopping at step {record['best_step'] + 3}")
    kill_at(record["best_step"] + 2, recipe, tmp_path / "parts", *overrides)
    assert_same_end(train(recipe, tmp_path / "parts", *overrides), whole)


def test_early_stopping_is_not_undone_when_the_run_is_killed_after_it(recipe, tmp_path, monkeypatch):
    overrides = ["teacher.train.steps=30", "teacher.train.early_stopping={patience: 3}"]
    with monkeypatch.context() as patched:
        patched.setattr("engine.finetune.hand_over", lambda *arguments: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(recipe, tmp_path, *overrides)
    record = read_stage(train(recipe, tmp_path, *overrides).directory)
    assert record["steps"] == record["best_step"] + 3


def test_the_last_weights_are_kept_where_the_recipe_wants_them(recipe, whole, tmp_path):
    stage = train(recipe, tmp_path, "teacher.train.keep=last")
    assert any(not torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(stage).items())
    final = [record for record in history(stage) if "validation" in record][-1]["validation"]["accuracy"]
    assert read_stage(stage.directory)["metrics"]["validation"]["accuracy"] == final


def test_weights_that_are_not_finite_are_neither_kept_nor_checkpointed(recipe, tmp_path):
    with pytest.raises(UserError, match=r"the (validation loss|loss|gradient norm) is not finite"):
        train(recipe, tmp_path, "teacher.train.learning_rate=1e38", "teacher.train.evaluate_every=1")
    for path in (tmp_path / "tiny/teacher.partial").rglob("model*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def stopped_and_edited(recipe, runs, **about):
    """Stops a run and changes what its checkpoints say about how they were made."""
    for path in kill_at(3, recipe, runs).glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, **about}))
        (path / "manifest.json").write_text(json.dumps(checkpoint.hash_directory(path, skip=("manifest.json",))))


def test_a_state_that_every_rank_holds_goes_on_at_any_number_of_ranks(recipe, whole, tmp_path):
    stopped_and_edited(recipe, tmp_path, processes=2)
    assert_same_end(train(recipe, tmp_path), whole)


def test_an_optimizer_state_that_cannot_be_spread_anew_says_so(recipe, tmp_path):
    stopped_and_edited(recipe, tmp_path, processes=2, zero_stage=2)
    with pytest.raises(UserError, match=r"made at ZeRO stage 2 and this run is at stage 0 .* set `parallel` back"):
        train(recipe, tmp_path)


CPU = {"offload_optimizer": "cpu", "offload_param": "none", "round_robin_gradients": False, "sub_group_size": None}


@pytest.mark.parametrize(
    ("optimizer", "before", "now", "message"),
    [
        ("adamw", {}, {"offload_optimizer": "none"}, None),
        ("adamw_8bit", {}, {}, "with adamw_8bit, whose 8-bit state cannot be spread anew: run with processes=4"),
        ("adamw", {"round_robin_gradients": True}, {}, "with round_robin_gradients, whose order cannot be spread anew"),
        ("adamw", {}, {"round_robin_gradients": True}, "with round_robin_gradients, whose order cannot be spread anew"),
        ("adamw", {"offload_param": "nvme"}, {}, "with state on NVMe, which cannot be spread anew"),
        ("adamw", {}, {"offload_optimizer": "nvme"}, "with state on NVMe, which cannot be spread anew"),
    ],
)
def test_what_deepspeed_cannot_cut_anew_is_refused(tmp_path, optimizer, before, now, message):
    checkpoints = checkpoint.Checkpoints(tmp_path, SimpleNamespace(layout=CPU | now, zero_stage=3), keep=1)
    try:
        if message is None:
            checkpoints._check_spread(tmp_path, 4, CPU | before, optimizer)
            return
        with pytest.raises(UserError, match=message):
            checkpoints._check_spread(tmp_path, 4, CPU | before, optimizer)
    finally:
        checkpoints.close()


def test_how_the_work_is_spread_may_change_before_an_interrupted_run_goes_on(recipe, tmp_path):
    kill_at(3, recipe, tmp_path)
    stage = train(recipe, tmp_path, "teacher.train.micro_batch_size=4")
    assert read_stage(stage.directory)["processes"].startswith("1 process, no ZeRO, accumulation = 2")


def test_reopened_weights_with_other_logits_are_not_handed_on(recipe, tmp_path, monkeypatch):
    original = loop.Fit._write_weights

    def write(self, target, weights):
        name = next(name for name in weights if name.endswith("classifier.weight"))
        original(self, target, {**weights, name: torch.zeros_like(weights[name])})

    monkeypatch.setattr(loop.Fit, "_write_weights", write)
    with pytest.raises(RuntimeError, match="do not give the logits of the run that saved them"):
        train(recipe, tmp_path)
    assert not (tmp_path / "tiny/teacher").exists()
