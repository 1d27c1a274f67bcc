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


def modules_of(path: Path) -> set[str]:
    """Returns the full names that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def product_files(*without: str) -> list[Path]:
    files = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    return [path for path in files if not path.relative_to(ROOT).as_posix().startswith(without)]


def strings_of(path: Path) -> set[str]:
    """Returns the strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in said]
    return {node.value for node in constants if isinstance(node.value, str)}


CONCRETE = {
    "task": ("engine/tasks/", "engine/answers/"),
    "objective": ("engine/objectives/",),
}
"""Kinds of modules that are found by their file name, and the rooms that know them."""


@pytest.mark.parametrize("kind", CONCRETE)
def test_no_module_outside_of_its_room_imports_or_names_a_concrete_one(kind):
    rooms = CONCRETE[kind]
    names = {p.stem for room in rooms for p in (ROOT / room).glob("*.py") if not p.stem.startswith("_")}
    assert names
    modules = {f"{room.replace('/', '.')}{name}" for room in rooms for name in names}
    imports = {str(path.relative_to(ROOT)): modules_of(path) & modules for path in product_files(*rooms)}
    assert {path: found for path, found in imports.items() if found} == {}
    # `classification` is also an extension of the inference protocol, which the front ends speak.
    spoken = ("export/serving/http_frontend.py", "export/serving/grpc_frontend.py", "export/serving/service.py")
    named = {str(path.relative_to(ROOT)): strings_of(path) & names for path in product_files(*rooms, *spoken)}
    assert {path: found for path, found in named.items() if found} == {}


def test_no_module_but_the_family_table_names_an_architecture():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    table = "engine/models/families.py"
    named = {str(path.relative_to(ROOT)): strings_of(path) & set(CONFIG_MAPPING_NAMES) for path in product_files(table)}
    assert {path: found for path, found in named.items() if found} == {}


def test_imports_go_round_in_no_circle():
    """Those inside of functions and for types count too: a circle of files is one file that is hard to read."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in product_files()}
    reads = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & files.keys()) | ({node.module} if inner - files.keys() else set())
        reads[name] = found & files.keys() - {name}
    while free := [name for name, found in reads.items() if not found & reads.keys()]:
        for name in free:
            del reads[name]
    assert reads.keys() == set(), "these are in a circle or read one that is"


def test_the_answering_halves_import_numpy_tokenizers_and_each_other_only():
    """A Triton repository gets a copy of them, and nothing else of ours."""
    allowed = {*sys.stdlib_module_names, "numpy", "tokenizers"}
    for path in sorted((ROOT / "engine" / "answers").glob("*.py")):
        ours = {name for name in modules_of(path) if name == "engine" or f"{name}.".startswith("engine.answers.")}
        assert {name for name in modules_of(path) - ours if name.partition(".")[0] not in allowed} == set(), path


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


COMMANDS = "run sweep launch status logs cancel check predict new evaluate serve verify report benchmark doctor"


@pytest.mark.parametrize("command", ["", *COMMANDS.split()])
def test_help_loads_nothing_heavy(command):
    assert loaded_by(*command.split(), "--help") == set()


def test_a_submission_loads_nothing_heavy(tmp_path):
    assert loaded_by("launch", str(write_recipe(tmp_path)), "--slurm", "--dry-run") == set()


def test_check_loads_nothing_heavy(tmp_path):
    assert loaded_by("check", str(write_recipe(tmp_path))) == set()
