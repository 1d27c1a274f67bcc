"""What is printed reaches any terminal and any pipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import finetune_section, write_recipe, write_rows
from tests.unit.bundles import shared_bundle

ROOT = Path(__file__).parents[2]
SAID = "ein schöner Film 电影 🎬"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return shared_bundle(tmp_path_factory)


def bothways(*arguments, encoding=None, code="from launch.cli import main; main()", **options):
    """Runs the command as a process of its own, whose standard streams have this encoding."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"PYTHONIOENCODING": encoding} if encoding else {})}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, **{"capture_output": True, "timeout": 60, **options})


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "ein sch?ner Film ?? ?"), ("latin-1", "ein schöner Film ?? ?")])
def test_characters_that_a_terminal_lacks_are_replaced(bundle, encoding, shown):
    done = bothways("predict", bundle, SAID, encoding=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).split("\t")[2] == f"{shown}\n"


def test_json_for_a_terminal_without_unicode_loses_nothing(bundle):
    done = bothways("predict", bundle, SAID, "--json", encoding="ascii")
    assert done.returncode == 0
    assert json.loads(done.stdout)["input"] == {"text": SAID}


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["doctor"]])
def test_commands_that_print_arrows_and_dots_print_them_to_any_terminal(arguments):
    assert bothways(*arguments, encoding="ascii").returncode == 0


def test_a_recipe_with_any_names_is_checked_on_any_terminal(tmp_path):
    rows = [{"text": f"film {number}", "mærke": str(number % 2)} for number in range(40)]
    task = {"type": "classification", "text": "text", "label": "mærke"}
    write_rows(tmp_path / "rækker.jsonl", rows)
    recipe = write_recipe(tmp_path, {"lærer": {"finetune": finetune_section(data={"train": "rækker.jsonl"}, task=task)}})
    done = bothways("check", recipe, encoding="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1
    recipe = write_recipe(tmp_path, {"teacher": {"finetune": finetune_section(data={"train": "rækker.jsonl"}, task=task)}})
    done = bothways("check", recipe, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, b"")


def test_standard_input_that_is_called_ascii_is_read_as_utf8_and_bytes_that_are_no_text_are_one_line(bundle):
    done = bothways("predict", bundle, "--json", encoding="ascii", input=f"{SAID}\n".encode())
    assert json.loads(done.stdout)["input"] == {"text": SAID}
    done = bothways("predict", bundle, encoding="utf-8", input="ein schöner Film\n".encode("latin-1"))
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: standard input: not valid UTF-8")
    assert done.stderr.count(b"\n") == 1


def test_a_rank_prints_to_any_terminal_and_to_a_reader_that_has_left():
    code = (
        "import sys, time\nfrom engine.stages.rank import run_rank\nfrom rich.console import Console\n"
        "def work():\n    print('step 1 → 2', flush=True)\n    sys.stdin.readline()\n"
        "    print('lost', flush=True)\n    Console().print('×' * 99)\n    print('done', file=sys.stderr)\n"
        "run_rank(work, '.')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"step 1 ? 2\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b"done\n"
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    "code",
    [
        "from launch.cli import main; main()",
        # A table of rich's, which would end the process itself.
        "from rich.console import Console; from launch import cli; cli.app = lambda *a, **k: [Console().print('x' * 70)"
        " for _ in range(9999)]; cli.main()",
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(bundle, tmp_path, code):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a good film " * 8}] * 4000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "predict", str(bundle), "--input", str(rows)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141  # as a shell shows SIGPIPE


def test_what_is_buffered_for_a_reader_that_has_left_is_no_complaint(bundle):
    read, write = os.pipe()
    os.close(read)
    done = bothways("predict", bundle, "a good film", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_standard_output_is_no_mistake(bundle):
    code = "import os, sys; sys.stdout = None; from launch.cli import main; main()"
    done = bothways("predict", bundle, "a good film", code=code)
    assert (done.returncode, done.stderr) == (0, b"")


def test_records_of_stages_hold_any_text_where_the_locale_is_ascii(tmp_path):
    """Python then opens files as ASCII, unless it is told how."""
    code = (
        "import sys; from pathlib import Path; from engine.config import Strict, load_recipe\n"
        "from engine.stages.stage import Stage, read_stage\n"
        "class Section(Strict):\n    text: str\n"
        "stage = Stage(load_recipe(sys.argv[1], None, sys.argv[2]), 'one', Section)\n"
        "stage.begin()\nstage.complete(said=stage.config.text)\n"
        "assert stage.finished() and read_stage(stage.directory)['said'] == stage.config.text"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: any\nstages:\n  one:\n    kind: {{text: {SAID}}}\n", encoding="utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(recipe), str(tmp_path / "runs")]
    done = subprocess.run(command, env={**os.environ, **ascii_locale}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
