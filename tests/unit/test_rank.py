"""What a rank leaves behind when it ends: its record, its log, and in which phase its memory ran out."""

import os
import subprocess
import sys

import pytest

from engine.stages.rank import ERROR_DIRECTORY, LOGS, PARENT, memory_message, read_records
from tests.distributed.conftest import ROOT

PROGRAM = """\
import sys
from engine.stages import heartbeat
from engine.stages.rank import run_rank

def work():
    print("hello from the rank", flush=True)
    heartbeat.beat("forward", 3)
    {what}

run_rank(work, "runs")
"""


def rank(directory, what, **environment):
    environment = {**os.environ, ERROR_DIRECTORY: str(directory), "RANK": "2", **environment}
    command = [sys.executable, "-c", PROGRAM.format(what=what)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    (record,) = read_records(directory)
    return done, record


GPU_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error. Last error:\\nCuda failure 2 'out of memory'",
]
"""What torch, cuBLAS and NCCL say when a GPU is full."""


@pytest.mark.parametrize(
    "what",
    [
        *("import torch; torch.empty(2**58)", "raise MemoryError('no room')", "raise MemoryError"),
        *(f'raise RuntimeError("{text}")' for text in GPU_MEMORY),
    ],
)
def test_memory_that_runs_out_is_a_line_with_the_phase_and_what_to_change(tmp_path, what):
    done, record = rank(tmp_path, what)
    assert (done.returncode, record.status, record.rank) == (2, 2, 2)
    assert record.message.startswith("out of memory in forward at step 3: lower train.micro_batch_size")
    assert "\n" not in record.message


def test_another_error_keeps_its_traceback(tmp_path):
    _, record = rank(tmp_path, "raise ValueError('bad')")
    assert (record.status, record.message.splitlines()[-1]) == (1, "ValueError: bad")


@pytest.mark.parametrize(("what", "status"), [("pass", 0), ("raise ValueError('bad')", 1)])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_request_to_stop_that_comes_after_the_work_changes_nothing(tmp_path, what, status, number):
    late = f"import os, signal, weakref; weakref.finalize(os, signal.raise_signal, signal.{number}); {what}"
    done, record = rank(tmp_path, late)
    assert (done.returncode, record.status, done.stderr) == (status, status, "")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process when its parent is gone")
@pytest.mark.parametrize(("parent", "status"), [("1", -9), (str(os.getpid()), 0)])
def test_a_process_whose_launcher_was_gone_before_it_began_ends_at_once(tmp_path, parent, status):
    environment = {**os.environ, ERROR_DIRECTORY: str(tmp_path), PARENT: parent}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(what="pass")], cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == status


def test_what_a_rank_prints_goes_to_its_log_where_logs_are_kept(tmp_path):
    done, _ = rank(tmp_path, "print('an error', file=sys.stderr)", **{LOGS: "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted((tmp_path / "rank2.log").read_text().splitlines()) == ["an error", "hello from the rank"]


def test_without_a_heartbeat_the_usual_remedies_are_named():
    assert memory_message(None).startswith("out of memory: lower train.micro_batch_size")
