"""Imports go downwards only, and the command line stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import write_recipe

ROOT = Path(__file__).parents[2]
FLOORS = ("engine", "export", "launch")
HEAVY = {
    *("torch", "transformers", "accelerate", "deepspeed", "datasets", "onnx", "onnxruntime", "torchmetrics"),
    *("matplotlib", "starlette", "uvicorn", "grpc", "tritonclient", "tensorboard", "tensorrt", "tensorrt_rtx", "modelopt"),
}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and node.level == 0}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_itself_and_the_floors_below(floor):
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    found = {str(path.relative_to(ROOT)): imported(path) & above for path in (ROOT / floor).rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("floor", FLOORS)
def test_no_product_file_imports_the_tests_or_the_benchmarks(floor):
    found = {str(path.relative_to(ROOT)): imported(path) & {"tests", "benchmarks"} for path in (ROOT / floor).rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def loaded_by(*arguments: str) -> set[str]:
    """Returns the heavy packages that a command has loaded when it ends."""
    code = (
        "import sys\nfrom launch.cli import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        "finally:\n    print('LOADED', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.rpartition("LOADED")[2].split())


COMMANDS = "run launch status logs cancel check predict serve verify report benchmark doctor"


@pytest.mark.parametrize("command", ["", *COMMANDS.split()])
def test_help_loads_nothing_heavy(command):
    assert loaded_by(*command.split(), "--help") == set()


def test_a_submission_loads_nothing_heavy(tmp_path):
    assert loaded_by("launch", str(write_recipe(tmp_path)), "--slurm", "--dry-run") == set()


def test_check_loads_nothing_heavy(tmp_path):
    assert loaded_by("check", str(write_recipe(tmp_path))) == set()
