"""DeepSpeed JSON files: what is known, filled in, refused; which machine can run them."""

import json

import pytest

from engine.config import load_recipe
from engine.errors import UserError
from engine.training.processes import require_processes
from engine.training.zero import NVME_VARIABLE, Host, prepare_nvme, read_zero_config
from engine.training.zero import zero_config_of as name_of
from engine.training.zero_files import SHIPPED, find_zero_config, zero_config_names
from launch import local
from launch.recipe import load_stages
from tests.recipes import write_recipe

CPU = Host(cuda=False, local_processes=2)
GPU = Host(cuda=True, local_processes=8)


def section(tmp_path, *overrides):
    return load_stages(load_recipe(write_recipe(tmp_path / "recipe"), list(overrides)))[0].config


def read(tmp_path, config, *overrides, place=None):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    return read_zero_config(path, section(tmp_path, *overrides).train, 4, 2, place)


def stage(number, **changes):
    gather = {"stage3_gather_16bit_weights_on_model_save": True} if number == 3 else {}
    return {"zero_optimization": {"stage": number, **gather, **changes}}


CPU_OFFLOAD, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "auto"}


def test_the_shipped_configurations_are_those_that_are_documented():
    assert zero_config_names() == [
        *("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_hpz", "zero3_nvme", "zero3_offload", "zeropp")
    ]


@pytest.mark.parametrize("name", zero_config_names())
def test_a_shipped_configuration_leaves_nothing_open_once_the_place_is_known(tmp_path, name):
    place = Host(cuda=True, local_processes=8, scratch=tmp_path / "runs" / "tiny" / "teacher.partial")
    config = read_zero_config(find_zero_config(name, tmp_path), section(tmp_path).train, 4, 2, place)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 8


@pytest.mark.parametrize("name", zero_config_names())
def test_deepspeed_itself_accepts_every_shipped_configuration(tmp_path, name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    place = Host(cuda=True, local_processes=8, scratch=tmp_path)
    config = read_zero_config(find_zero_config(name, tmp_path), section(tmp_path).train, 4, 2, place)
    DeepSpeedZeroConfig(**config["zero_optimization"])


def test_the_known_keys_are_deepspeeds_own(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from engine.training import zero_keys
    from tests.unit.deepspeed_keys import known_keys

    for name, keys in known_keys().items():
        assert sorted(getattr(zero_keys, name)) == sorted(keys), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**stage(2), "gradient_cliping": 1.0}, "DeepSpeed has no key 'gradient_cliping': did you mean 'gradient_clipping'?"),
        (stage(2, reduce_bucket=1), "no key 'zero_optimization.reduce_bucket': did you mean 'reduce_bucket_size'?"),
        (stage(2, offload_optimizer={"devise": "cpu"}), "'zero_optimization.offload_optimizer.devise': did you mean 'device'?"),
        (stage(3, offload_param={"device": "cpu", "ratio": 1}), "no key 'zero_optimization.offload_param.ratio'"),
        (stage(2, cpu_offload=True), "no key 'zero_optimization.cpu_offload'"),
        (stage(2, offload_optimizer="cpu"), 'offload_optimizer must be an object, as in {"device": "cpu"}'),
        (stage(2, offload_optimizer={"device": "gpu"}), "offload_optimizer.device must be none, cpu or nvme"),
        (stage(True), "zero_optimization.stage must be 0, 1, 2 or 3"),
        (stage(2, reduce_bucket_size="many"), 'zero_optimization.reduce_bucket_size must be a number, not "many"'),
        (stage(3, zero_hpz_partition_size="x"), 'zero_optimization.zero_hpz_partition_size must be a number, not "x"'),
        (stage(2, compute_grad_norm=False), "compute_grad_norm=false: train.clip needs the norm"),
        ({**stage(2), "fp16": True}, 'fp16 must be an object, as in {"enabled": true}'),
        ({**stage(2), "data_types": 3}, "data_types must be an object"),
        ({**stage(2), "data_types": None}, None),
        ({**stage(2), "communication_data_type": "fp16"}, "gradients are summed over ranks in fp32"),
        ({**stage(2), "amp": {"enabled": True}}, "DeepSpeed has no key 'amp'"),
        ({**stage(2), "scheduler": {"type": "WarmupLR"}}, "'scheduler' is set here, but the recipe decides it"),
        ({**stage(2), "torch_autocast": {"enabled": True}}, "'torch_autocast' is enabled here, but the recipe decides it"),
        ({**stage(2), "data_types": {"grad_accum_dtype": "bf16"}}, "gradients are summed in fp32"),
        ({**stage(2), "activation_checkpointing": {}}, "does nothing to these models: remove it and set train.gradient_chec"),
        ({**stage(2), "gradient_allreduce_op": "sum"}, "gradient_allreduce_op must be average"),
        ({**stage(2), "data_efficiency": {"enabled": True}}, "changes what is trained on, which the recipe decides"),
        ({**stage(2), "sequence_parallel_size": 2}, "splits the model, but train.batch_size is shared out over all ranks"),
        (stage(0, offload_optimizer=CPU_OFFLOAD), "offload_optimizer does nothing at stage 0: use stage 1, 2 or 3"),
        (stage(2, offload_param=CPU_OFFLOAD), "offload_param does nothing at stage 2: use stage 3"),
        (stage(2, offload_optimizer=NVME), "offload_optimizer to nvme falls back to the CPU silently at stage 2"),
        (stage(1, offload_optimizer=NVME), "falls back to the CPU silently at stage 1"),
        (stage(2, offload_param=NVME), "offload_param does nothing at stage 2"),
        (stage(3, offload_optimizer={"device": "nvme"}), "offload_optimizer to nvme needs nvme_path"),
        (stage(3, offload_param={"device": "nvme"}), "offload_param to nvme needs nvme_path"),
        (stage(2, zenflow={}), None),
        (stage(2, zenflow={"topk_ratio": 0.1}), "zenflow turns the losses into NaN"),
        (stage(3, stage3_prefetch_bucket_size="auto"), 'stage3_prefetch_bucket_size is "auto", which nothing fills in'),
    ],
)
def test_what_deepspeed_would_ignore_or_get_wrong_is_refused_in_one_line(tmp_path, config, message):
    if message is None:
        read(tmp_path, config)
        return
    with pytest.raises(UserError) as error:
        read(tmp_path, config)
    assert str(error.value).startswith(f"{tmp_path / 'zero.json'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Precision.


def test_deepspeeds_autocast_is_accepted_where_it_says_what_the_recipe_says(tmp_path):
    config = {**stage(3), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    read(tmp_path, config, "teacher.train.precision=bf16")
    for precision in ("auto", "fp32", "fp16"):
        with pytest.raises(UserError, match=r"'torch_autocast' is enabled here"):
            read(tmp_path, config, f"teacher.train.precision={precision}")
    with pytest.raises(UserError, match=r"'torch_autocast' is enabled here"):
        read(tmp_path, {**stage(3), "torch_autocast": {"enabled": True, "dtype": "float16"}}, "teacher.train.precision=bf16")


def test_fp16_turns_dynamic_loss_scaling_on_and_keeps_what_the_file_says_about_it(tmp_path):
    fp16 = "teacher.train.precision=fp16"
    assert read(tmp_path, stage(2), fp16)["fp16"] == {"loss_scale": 0, "initial_scale_power": 16, "enabled": True}
    own = read(tmp_path, {**stage(2), "fp16": {"loss_scale_window": 50, "enabled": True}}, fp16)["fp16"]
    assert (own["loss_scale_window"], own["enabled"]) == (50, True)
    assert "fp16" not in read(tmp_path, stage(2))
    with pytest.raises(UserError, match=r"fp16.enabled=false contradicts train.precision=fp16"):
        read(tmp_path, {**stage(2), "fp16": {"enabled": False}}, fp16)


def test_fp16_is_refused_without_a_gpu_and_where_it_is_run_not_where_it_is_checked(tmp_path, monkeypatch):
    fp16 = "teacher.train.precision=fp16"
    read(tmp_path, stage(2), fp16)
    read(tmp_path, stage(2), fp16, place=GPU)
    with pytest.raises(UserError, match=r"precision=fp16 needs a GPU and there is none here: use bf16 or fp32"):
        read(tmp_path, stage(2), fp16, place=CPU)
    monkeypatch.setattr(local, "gpus", lambda: 0)
    (wanted,) = load_stages(load_recipe(tmp_path / "recipe/recipe.yaml", [fp16]))
    with pytest.raises(UserError, match=r"zero0\.json: train.precision=fp16 needs a GPU"):
        local.run_stage(wanted, [fp16], print)


def test_one_process_needs_no_deepspeed_except_for_the_loss_scaling_of_fp16(tmp_path):
    assert name_of(section(tmp_path), 1) is None
    assert name_of(section(tmp_path), 2) == "zero0"
    assert name_of(section(tmp_path, "teacher.train.precision=fp16"), 1) == "zero0"
    assert name_of(section(tmp_path, "teacher.parallel=zero3"), 1) == "zero3"


# Hardware.


def test_zeropp_is_refused_without_a_gpu_and_hpz_is_not(tmp_path):
    train = section(tmp_path).train
    with pytest.raises(UserError, match=r"zero_quantized_weights \(ZeRO\+\+\) needs CUDA kernels and there is no GPU here"):
        read_zero_config(SHIPPED / "zeropp.json", train, 4, 1, CPU)
    read_zero_config(SHIPPED / "zeropp.json", train, 4, 1, GPU)
    assert read_zero_config(SHIPPED / "zero3_hpz.json", train, 4, 1, CPU)["zero_optimization"]["zero_hpz_partition_size"] == 2


def test_gradients_travel_quantized_in_fp16_only(tmp_path):
    quantized = stage(3, zero_quantized_gradients=True)
    with pytest.raises(
        UserError, match=r"zero_quantized_gradients: its kernels take fp16 gradients, and train.precision gives fp32"
    ):
        read(tmp_path, quantized, "teacher.train.precision=bf16", place=GPU)
    assert read(tmp_path, quantized, "teacher.train.precision=fp16", place=GPU)["fp16"]["enabled"]


def test_layers_that_stage_3_gathers_are_not_compiled(tmp_path):
    with pytest.raises(UserError, match=r"train.compile: stage 3 gathers"):
        read(tmp_path, stage(3), "teacher.train.compile=true")
    read(tmp_path, stage(2), "teacher.train.compile=true")


def test_an_hpz_group_has_to_divide_the_processes_of_a_node(tmp_path):
    with pytest.raises(UserError, match=r'zero_hpz_partition_size=3 does not divide the 8 processes here: say "auto"'):
        read(tmp_path, stage(3, zero_hpz_partition_size=3), place=GPU)
    read(tmp_path, stage(3, zero_hpz_partition_size=4), place=GPU)


# NVMe.


def test_swapping_goes_to_the_stages_directory_or_to_the_local_disk_that_the_machine_names(tmp_path, monkeypatch):
    scratch = tmp_path / "runs" / "tiny" / "teacher.partial"
    monkeypatch.delenv(NVME_VARIABLE, raising=False)
    assert Host(scratch=scratch).nvme == scratch / "nvme"
    monkeypatch.setenv(NVME_VARIABLE, str(tmp_path / "local"))
    zero = read(tmp_path, stage(3, offload_optimizer=dict(NVME)), place=Host(scratch=scratch))["zero_optimization"]
    # Two stages on one machine do not meet there.
    assert zero["offload_optimizer"]["nvme_path"] == str(tmp_path / "local/tiny/teacher.partial/nvme")
    own = {"device": "nvme", "nvme_path": "/elsewhere"}
    zero = read(tmp_path, stage(3, offload_optimizer=own), place=Host(scratch=scratch))["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == "/elsewhere"


def test_a_directory_that_cannot_be_swapped_to_is_named_before_training(tmp_path):
    (tmp_path / "file").touch()
    config = stage(3, offload_param={"device": "nvme", "nvme_path": str(tmp_path / "file" / "below")})
    with pytest.raises(UserError, match=r"below: cannot be swapped to \(Not a directory\): set BOTHWAYS_NVME_PATH"):
        prepare_nvme(config)


def test_a_directory_that_can_be_swapped_to_is_made_and_left_empty(tmp_path):
    path = tmp_path / "a" / "b"
    config = stage(3, offload_param={"device": "nvme", "nvme_path": str(path)}, offload_optimizer=CPU_OFFLOAD)
    try:
        assert prepare_nvme(config) == [path]
    except UserError as error:
        pytest.skip(str(error))
    assert list(path.iterdir()) == []
    assert prepare_nvme(stage(2)) == []


@pytest.mark.parametrize("wanted", ["auto", 2])
def test_as_many_ranks_as_the_recipe_asks_for_are_right(wanted):
    require_processes(wanted, 2, cuda=False)


def test_fewer_ranks_than_the_recipe_asks_for_are_right_on_gpus_only_and_more_nowhere():
    require_processes(2, 1, cuda=True)
    for wanted, started, cuda in ((2, 1, False), (2, 3, True), (1, 2, False)):
        with pytest.raises(UserError, match=f"asks for processes={wanted}, but {started} were started"):
            require_processes(wanted, started, cuda)
