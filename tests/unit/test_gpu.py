"""GPUs as the driver shows them, and as torch can use them: no GPU is needed."""

import ctypes

import pytest
import torch

from engine import gpu
from engine.config import load_recipe
from engine.errors import UserError
from engine.models import compile_layers
from launch import doctor, resume_check
from launch.recipe import load_stages
from tests.recipes import finetune_section, train_section, write_recipe
from tests.unit.models import tiny_masked_lm


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """An empty /dev, and a torch that is no build for CPUs."""
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(gpu, "DEVICES", tmp_path)
    monkeypatch.setattr(gpu, "WSL", tmp_path / "dxg")
    monkeypatch.setattr(gpu, "VERSION", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def with_gpus(devices, count):
    for index in range(count):
        (devices / f"nvidia{index}").touch()
    (devices / "nvidiactl").touch()


def test_hidden_gpus_are_not_counted(devices, monkeypatch):
    with_gpus(devices, 4)
    assert gpu.gpus() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert gpu.gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpus() == 0


def test_a_torch_for_cpus_has_none(devices, monkeypatch):
    with_gpus(devices, 2)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert gpu.gpus() == 0


class Library:
    """NVML with so many GPUs, as ctypes shows it."""

    def __init__(self, count, status=0):
        self.count, self.status, self.calls = count, status, []

    def __call__(self, name):
        assert name == gpu.LIBRARY
        return self

    def nvmlInit_v2(self):  # noqa: N802 - names of the library
        self.calls.append("init")
        return self.status

    def nvmlDeviceGetCount_v2(self, place):  # noqa: N802
        ctypes.cast(place, ctypes.POINTER(ctypes.c_uint)).contents.value = self.count
        return 0

    def nvmlShutdown(self):  # noqa: N802
        self.calls.append("shutdown")


def test_windows_gpus_are_counted_by_the_drivers_library(devices, monkeypatch):
    library = Library(2)
    monkeypatch.setattr(gpu.ctypes, "CDLL", library)
    assert gpu.gpus() == 0, "without /dev/dxg this is no WSL2: the library is not asked"
    assert library.calls == []
    (devices / "dxg").touch()
    assert gpu.gpus() == 2
    assert library.calls == ["init", "shutdown"]


def test_a_library_that_does_not_answer_or_is_not_there_means_no_gpus(devices, monkeypatch):
    (devices / "dxg").touch()
    monkeypatch.setattr(gpu, "LIBRARY", "no-such-library.so")
    assert gpu.gpus() == 0
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Library(2, status=9))
    assert gpu.gpus() == 0


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.54.03  Release Build",
    ],
)
def test_gpus_that_torch_cannot_use_are_refused_with_both_versions(devices, monkeypatch, line):
    with_gpus(devices, 2)
    (devices / "version").write_text(line + "\nGCC version:  gcc version 12.2.0\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError) as error:
        gpu.require_usable()
    assert "has 2 GPUs and the NVIDIA driver 535.54.03, but torch" in str(error.value)
    assert "is built for CUDA 13.0" in str(error.value)
    assert "CUDA_VISIBLE_DEVICES=" in str(error.value)


def test_nothing_is_said_where_torch_can_use_them_or_they_are_hidden(devices, monkeypatch):
    with_gpus(devices, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu.require_usable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.require_usable()


def test_a_driver_that_says_no_version_is_said_to_have_none(devices):
    with_gpus(devices, 1)
    assert gpu.driver() == "of unknown version"


@pytest.mark.parametrize(("capability", "runs"), [((8, 9), True), ((12, 0), True), ((9, 0), False), ((8, 0), False)])
def test_the_doctor_knows_which_gpus_run_engines_for_rtx(monkeypatch, capability, runs):
    pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
    monkeypatch.setattr(doctor, "gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    finding = doctor._tensorrt_rtx()
    assert ("builds and runs engines" in finding.says) == runs
    if not runs:
        assert f"runs none: TensorRT-RTX does not run on GPUs of kind sm_{capability[0]}{capability[1]}" in finding.says
        assert "bothways[tensorrt]" in finding.fix


@pytest.mark.parametrize("count", [0, 1])
def test_resume_is_proved_with_kernels_that_repeat_where_there_is_a_gpu(tmp_path, monkeypatch, count):
    seen, said = [], []
    monkeypatch.setattr(resume_check, "gpus", lambda: count)
    monkeypatch.setattr(resume_check, "_trials", lambda place, *rest: seen.append(place) or [])
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(train=train_section(compile=True))}})
    resume_check.resume_check(recipe, [], tmp_path / "runs", "teacher", 10, 0, said.append)
    (config,) = [stage.config for stage in load_stages(load_recipe(seen[0].path, seen[0].settings))]
    assert (config.train.deterministic, config.train.compile) == (count > 0, count == 0)
    assert any("train.deterministic=true" in line for line in said) == (count > 0)


def test_compiled_and_deterministic_are_not_both_to_be_had(tmp_path):
    recipe = write_recipe(
        tmp_path, {"teacher": {"finetune": finetune_section(train=train_section(compile=True, deterministic=True))}}
    )
    with pytest.raises(UserError, match="leave one out"):
        load_stages(load_recipe(recipe))


def test_layers_are_compiled_in_place_and_keep_their_names():
    model = tiny_masked_lm()
    before = list(model.state_dict())
    compile_layers(model)
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert len(compiled) == model.config.num_hidden_layers
    assert list(model.state_dict()) == before
