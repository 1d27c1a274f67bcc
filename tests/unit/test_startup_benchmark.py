"""The benchmark of starting: it watches the heartbeat of the first rank."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import startup
from engine.config import load_recipe
from engine.stages import heartbeat
from launch.recipe import load_stages


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield child
        child.kill()


def test_the_first_step_has_ended_when_the_second_one_begins(tmp_path, process):
    (tmp_path / "bothways-1").mkdir()
    writer = heartbeat._Writer(str(tmp_path / "bothways-1"))
    began, watched = time.time(), []
    thread = threading.Thread(target=lambda: watched.append(startup._watch(process, tmp_path, began)))
    thread.start()
    for phase, step in (("start", None), ("evaluate", 0), ("forward", 0), ("update", 0)):
        writer.write(phase, step)
        time.sleep(0.05)
    assert thread.is_alive()
    writer.write("data", 1)
    thread.join(10)
    (start,) = watched
    assert [phase for _, phase in start.phases] == ["start", "evaluate", "forward", "update"]
    assert start.phases[-1][0] <= start.seconds
    assert start.cpu_seconds > 0
    assert start.memory > 1e6


def test_a_stage_that_ends_without_a_step_is_an_error(tmp_path, process):
    process.kill()
    process.wait()
    with pytest.raises(RuntimeError, match="no first step"):
        startup._watch(process, Path(tmp_path), time.time())


def test_the_recipe_is_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(startup.recipe_of(startup.SMALL)))
    assert [stage.name for stage in load_stages(load_recipe(tmp_path / "recipe.yaml"))] == ["small"]


def test_made_up_rows_are_all_different(tmp_path):
    startup.write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}], 5)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) == 5
    assert json.loads(lines[3]) == {"text": "3 b", "label": "1"}
