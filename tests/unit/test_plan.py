"""Memory before a run: formulas, footprints without memory, and what the command says."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.errors import UserError
from engine.models import load_tokenizer
from engine.objectives import mlm
from engine.training.optim import hidden_matrices
from engine.training.zero_files import SHIPPED
from launch.planning import footprint, plan
from launch.planning.footprint import Measured, Moment, frontier
from launch.planning.memory import Level, Need, Setting
from launch.planning.plan import Machine, machine_for, parse_bytes, plan_level, plan_stage, print_plan, used
from launch.recipe import load_stages
from tests.recipes import finetune_section, pretrain_section, train_section, write_recipe
from tests.unit.models import tiny_classifier, tiny_masked_lm
from tests.unit.test_recipe import CHAIN

GPU = Machine(ranks=2, gpu=True, memory=2**40, memory_in_words="a GPU")
CPU = Machine(ranks=1, gpu=False, memory=2**40, memory_in_words="this machine")
MILLION = 10**6
MODEL = Measured(
    numels=(8 * MILLION, 2 * MILLION, 1000),
    largest_module=8 * MILLION,
    rows=(2, 4),
    moments=([Moment(200, 0), Moment(20, 40_004_000)], [Moment(400, 0), Moment(40, 40_004_000)]),
)
"""Ten million elements; 100 bytes of activations a row."""
BULKY = replace(
    MODEL, moments=([Moment(2 * MILLION, 0), Moment(200, 40_004_000)], [Moment(4 * MILLION, 0), Moment(400, 40_004_000)])
)
"""The same with a megabyte of activations a row."""


def zero(name, **changes):
    return json.loads((SHIPPED / f"{name}.json").read_text())["zero_optimization"] | changes


def setting(**changes):
    return Setting(**{"ranks": 2, "accumulation": 1, "optimizer_bytes": 8, "weight_bytes": 4, "gpu": True, **changes})


def need(name, rows=2, model=MODEL, **changes) -> Need:
    return Level(zero(name) if name else None, model.at(rows), setting(**changes)).peak()


def stage_of(tmp_path, *overrides, stages=None, name="teacher"):
    recipe = load_recipe(write_recipe(tmp_path, stages), list(overrides), tmp_path / "runs")
    return next(stage for stage in load_stages(recipe) if stage.name == name)


# Formulas.


@pytest.mark.parametrize(("ranks", "share"), [(1, 10_001_000), (2, 5_000_500), (4, 2_500_250)])
def test_each_level_splits_what_it_is_said_to_split(ranks, share):
    whole = 10_001_000
    first, second, third = (need(f"zero{stage}", ranks=ranks) for stage in (1, 2, 3))
    assert (first.group("parameters"), first.group("optimizer")) == (4 * whole, 12 * share)
    assert (second.group("parameters"), second.group("optimizer")) == (4 * whole, 12 * share)
    # Small weights are whole on every rank, beside its shard of them.
    small = 0 if ranks == 1 else 4000
    assert (third.group("parameters"), third.group("optimizer")) == (4 * share + small, 12 * share)
    plain = need(None, ranks=1)
    assert plain.group("parameters") + plain.group("gradients") + plain.group("optimizer") == 16 * whole


@given(
    name=st.sampled_from(["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"]),
    ranks=st.integers(2, 64),
    rows=st.integers(1, 64),
    accumulation=st.integers(1, 8),
    gpu=st.booleans(),
)
def test_more_ranks_or_fewer_rows_never_need_more_memory(name, ranks, rows, accumulation, gpu):
    def total(rows, ranks):
        return used(need(name, rows, ranks=ranks, accumulation=accumulation, gpu=gpu), gpu)

    assert total(rows, 2 * ranks) <= total(rows, ranks) <= total(rows + 1, ranks)


def test_offloading_moves_bytes_from_the_device_to_the_host_and_to_the_disk():
    on_device, on_host, on_disk = need("zero3"), need("zero3_offload"), need("zero3_nvme")
    assert on_device.total("host") == on_device.total("disk") == 0
    assert on_host.total("device") < on_device.total("device")
    assert on_host.total("host") > 12 * 5_000_500
    assert on_disk.total("disk") == 16 * 5_000_500  # weights, fp32 copy, two averages
    assert need("zero2_offload").group("optimizer", "host") == 12 * 5_000_500


def test_fp16_halves_the_weights_and_not_those_that_the_optimizer_updates():
    half = need("zero3", weight_bytes=2)
    assert half.group("optimizer") == 12 * 5_000_500
    assert half.group("parameters") == 2 * 5_000_500 + 2000


def test_an_eight_bit_optimizer_keeps_a_quarter_of_the_averages():
    assert need("zero0", optimizer_bytes=2.06).group("optimizer") == round(2.06 * 10_001_000)


def test_a_gpu_holds_the_whole_bucket_and_a_cpu_what_is_written_to():
    assert need("zero3", gpu=True).total() - need("zero3", gpu=False).total() >= 4 * (50_000_000 - 10_001_000)


def test_hpz_keeps_a_second_copy_of_the_weights_on_the_node():
    plain = Level(zero("zero3"), MODEL.at(2), setting()).peak()
    again = Level(zero("zero3_hpz", zero_hpz_partition_size=2), MODEL.at(2), setting()).peak()
    assert again.group("parameters") - plain.group("parameters") == 4 * 10_001_000 // 2


def test_every_number_says_where_it_comes_from():
    for name in plan.LEVELS:
        assert all(item.formula and item.bytes >= 0 for item in need(name).items)


@pytest.mark.parametrize("level", ["zero1", "zero2", "zero3"])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(level):
    rows = 10_000_000  # a gigabyte of activations: what decides
    memory = used(need(level, rows), True)
    found = plan_level(level, zero(level), MODEL, setting(), Machine(2, True, memory, ""), micro=2, share=1024)
    assert (found.largest_micro_batch, found.usable_micro_batch) == (plan.MOST_ROWS, 1024)
    machine = Machine(2, True, used(need(level, 500_000, accumulation=2), True), "")
    found = plan_level(level, zero(level), BULKY, setting(), machine, micro=2, share=1024)
    assert used(need(level, found.largest_micro_batch, BULKY, accumulation=2), True) <= machine.memory
    assert used(need(level, found.largest_micro_batch + 1, BULKY, accumulation=2), True) > machine.memory
    assert 0 < found.usable_micro_batch <= found.largest_micro_batch
    assert 1024 % found.usable_micro_batch == 0


def test_where_not_even_one_row_fits_it_says_zero():
    found = plan_level("zero2", zero("zero2"), MODEL, setting(), Machine(2, True, 1000, ""), micro=2, share=8)
    assert (found.fits, found.largest_micro_batch, found.usable_micro_batch) == (False, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1))
def test_the_frontier_leaves_out_only_what_another_moment_exceeds(points):
    moments = [Moment(*point) for point in points]
    kept = frontier(moments)
    assert set(kept) <= set(moments)
    for moment in moments:
        assert any(one.activations >= moment.activations and one.gradients >= moment.gradients for one in kept)


# Footprints.


def masked_lm_loss(model, rows):
    return mlm.Objective.made_up_loss(mlm.Config(), model, rows, 32)


def measure(gradient_checkpointing=False, precision="fp32", **shape):
    return footprint.measure(lambda: tiny_masked_lm(**shape), masked_lm_loss, precision, gradient_checkpointing)


def test_a_footprint_is_linear_in_the_rows(monkeypatch):
    foretold = measure().at(20)
    monkeypatch.setattr(footprint, "ROWS", (20, 40))
    counted = measure().at(20)
    assert foretold.moments[0].activations == pytest.approx(counted.moments[0].activations, rel=0.02)


def test_tied_weights_are_counted_once():
    model = tiny_masked_lm()
    assert measure().parameters == sum(parameter.numel() for parameter in model.parameters())
    assert measure().at(4).moments[-1].gradients == 4 * measure().parameters


def test_activations_are_those_that_autograd_keeps():
    import torch

    model, loss = tiny_masked_lm().train(), masked_lm_loss
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model, 8)
    saved, peak = sum(kept.values()), measure().at(8).moments[0].activations
    assert value.requires_grad
    # The peak holds what autograd keeps, and a few temporaries of the operation that is running.
    assert saved <= peak <= 1.25 * saved


def test_gradient_checkpointing_and_autocast_need_less():
    deep = {"num_hidden_layers": 6}
    plain, again, half = (measure(**deep), measure(True, **deep), measure(precision="bf16", **deep))
    assert again.at(64).moments[0].activations < 0.5 * plain.at(64).moments[0].activations
    assert half.at(64).moments[0].activations < plain.at(64).moments[0].activations


# Stages.


def test_a_stage_is_planned_without_its_weights(tmp_path):
    stage = stage_of(tmp_path, "teacher.parallel=zero2")
    (tmp_path / "model/model.safetensors").unlink()
    found = plan_stage(stage, GPU)
    assert [level.name for level in found.levels] == plan.LEVELS
    assert found.chosen == "zero2"
    assert "micro 4 × ranks 2 × accumulation 1" in found.split
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["base", "teacher"])
def test_every_precision_is_planned_for_gpus_on_a_machine_without_one(tmp_path, name, precision):
    overrides = [f"{name}.train.precision={precision}", f"{name}.train.gradient_checkpointing=true"]
    found = plan_stage(stage_of(tmp_path, *overrides, stages=CHAIN, name=name), GPU)
    assert f"; {precision}, gradient checkpointing" in found.split
    weights = found.levels[2].need.group("parameters")
    assert weights == (2 if precision == "fp16" else 4) * found.parameters


def test_a_gpu_keeps_no_scores_of_attention_unless_it_has_to_repeat_itself(tmp_path):
    layers, heads, rows, length = 2, 4, 4, 64

    def activations(deterministic):
        shape = f"base.model={{layers: {layers}, hidden: 16, heads: {heads}, positions: {length}}}"
        settings = [shape, f"base.sequence_length={length}", "base.train.dropout=0", f"base.train.deterministic={deterministic}"]
        found = plan_stage(stage_of(tmp_path, *settings, stages=CHAIN, name="base"), GPU)
        assert f"micro {rows}" in found.split
        return found.levels[0].need.group("activations")

    scores = layers * heads * rows * length**2 * 4
    assert activations("true") - activations("false") >= scores


def test_stages_whose_inputs_have_not_been_made_are_planned_from_the_recipe(tmp_path):
    base, teacher, student = (
        plan_stage(stage_of(tmp_path, stages=CHAIN, name=name), CPU) for name in ("base", "teacher", "student")
    )
    assert student.parameters < teacher.parameters
    assert abs(base.parameters - teacher.parameters) < 0.2 * teacher.parameters
    assert any("weights of the teacher" in item.formula for level in student.levels for item in level.need.items)


@pytest.mark.parametrize(
    ("family", "objective"), [("t5", "span_corruption"), ("bart", "denoising"), ("xlnet", "plm"), ("electra", "rtd")]
)
def test_a_new_model_and_the_classifier_that_is_made_of_it_are_planned(tmp_path, family, objective):
    shape = {"family": family, "layers": 2, "hidden": 32, "heads": 4, "positions": 64}
    vocabulary = {"train": {"type": "bpe", "vocab_size": 400}} if family != "xlnet" else {"train": {"vocab_size": 400}}
    base = pretrain_section(model=shape, tokenizer=vocabulary, objective={"type": objective}, train=train_section(steps=2))
    stages = {"base": {"pretrain": base}, "teacher": {"finetune": finetune_section(model="base")}}
    for name in stages:
        found = plan_stage(stage_of(tmp_path, stages=stages, name=name), CPU)
        assert found.parameters and all(level.need.items for level in found.levels)


def test_a_recipe_after_a_prune_that_has_not_run_says_so(tmp_path):
    stages = {**CHAIN, "again": {"finetune": finetune_section(model="slim")}}
    found = plan_stage(stage_of(tmp_path, stages=stages, name="again"), CPU)
    assert found.notes == ["stage 'slim' has not run: planned with the model before pruning"]


def going_on(**changes):
    section = pretrain_section(model="model", train=train_section(steps=2), **changes)
    if "tokenizer" not in changes:
        del section["tokenizer"]
    return {"base": {"pretrain": section}}


def test_a_model_that_cannot_learn_what_it_shall_is_refused(tmp_path):
    stage = stage_of(tmp_path, stages=going_on(objective={"type": "clm"}), name="base")
    with pytest.raises(UserError, match="models of type 'bert' cannot be pretrained to predict the next token"):
        plan_stage(stage, CPU)


def test_words_that_a_vocabulary_gets_are_planned(tmp_path):
    own, more = (
        plan_stage(stage_of(tmp_path, stages=going_on(**changes), name="base"), CPU).parameters
        for changes in ({}, {"tokenizer": {"extend": {"words": 100}}})
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    rows = len(load_tokenizer(tmp_path / "model")) + 100 - config["vocab_size"]
    assert more - own == rows * (config["hidden_size"] + 1)


def test_a_batch_that_does_not_divide_is_refused_with_its_line(tmp_path, capsys):
    path = write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: stage 'teacher': train.batch_size=8 is not a multiple"):
        print_plan(path, [], tmp_path / "runs", [], 3, None, False)
    with pytest.raises(UserError, match=r"--stage techer: .* has no such stage: did you mean 'teacher'\?"):
        print_plan(path, [], tmp_path / "runs", ["techer"], 2, None, False)


def test_a_stage_that_does_not_train_is_not_planned(tmp_path):
    path = write_recipe(tmp_path, CHAIN)
    with pytest.raises(UserError, match=r"^--stage slim: it does not train, so there is nothing to plan$"):
        print_plan(path, [], tmp_path / "runs", ["slim"], 1, None, False)


def test_a_level_that_the_recipe_cannot_take_is_left_out(tmp_path):
    found = plan_stage(stage_of(tmp_path, "teacher.train.optimizer=adamw_8bit"), GPU)
    assert [level.name for level in found.levels] == ["zero0", "zero1", "zero2", "zero3"]


def test_muon_keeps_one_average_of_the_matrices_of_the_layers(tmp_path):
    plans = [plan_stage(stage_of(tmp_path, f"teacher.train.optimizer={name}"), GPU) for name in ("adamw", "muon")]
    adamw, muon = (found.levels[0].need.group("optimizer") for found in plans)
    model = tiny_classifier()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    hidden = sum(sizes[name] for name in hidden_matrices(model))
    assert hidden > 0 and adamw - muon == pytest.approx(4 * hidden, rel=0.01)
    assert [level.name for level in plans[1].levels] == ["zero0"]


def test_a_users_own_json_is_planned_beside_the_shipped_ones(tmp_path):
    stage = stage_of(tmp_path, "teacher.parallel=own.json")
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}))
    found = plan_stage(stage, GPU)
    assert (found.chosen, found.levels[-1].name) == ("own.json", "own.json")


def test_the_command_prints_a_table_and_the_sources_or_json(tmp_path, capsys):
    path = write_recipe(
        tmp_path, {"teacher": {"finetune": finetune_section(parallel="zero3", train=train_section(precision="bf16"))}}
    )
    print_plan(path, [], tmp_path / "runs", [], 4, "80GB", False)
    shown = capsys.readouterr().out
    assert "zero3 *" in shown and "4 × P/N: the rank's shard of the weights" in shown
    assert "against 74.51 GiB of each GPU, less 1.50 GiB" in shown
    print_plan(path, [], tmp_path / "runs", ["teacher"], 4, "80GB", True)
    (stage,) = json.loads(capsys.readouterr().out)
    assert (stage["parallel"], stage["ranks"]) == ("zero3", 4)
    level = stage["levels"]["zero3"]
    assert level["device"] == sum(item["bytes"] for item in level["items"] if item["place"] == "device")
    assert level["fits"] is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1e9", 10**9), ("40gb", 40 * 10**9), ("1.5TiB", 3 * 2**39)],
)
def test_memory_is_read_with_its_unit(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "80 bananas", "GB", "8GiBs", "1.2.3GB", ".", "1e999GB", "0GB"])
def test_memory_without_a_number_or_with_another_unit_is_refused(text):
    with pytest.raises(UserError, match="write a number with a unit, as in 80GB or 24GiB"):
        parse_bytes(text)


def test_without_a_gpu_the_ranks_share_the_memory_of_the_machine(monkeypatch):
    monkeypatch.setattr(plan.torch.cuda, "is_available", lambda: False)
    one, two = machine_for(1, None), machine_for(2, None)
    assert (one.gpu, one.memory // 2) == (False, two.memory)
    assert machine_for(2, "80GB").gpu
