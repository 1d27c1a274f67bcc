"""Results, targets and what is said about them."""

import io
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import demo, demo_query, figures
from benchmarks.figures import FIGURE_KEYS, RESULT_KEYS, ROOT, Target, figure, read_results, read_targets, verdict, write_result
from engine.errors import UserError
from engine.intervals import Interval
from export.report.figures import read_run
from tests.unit.runs import write_demo_run, write_predictions, write_stage

ISSUE_2 = (
    "demo_minutes test_minutes teacher_accuracy engine_accuracy accuracy_drop_points speedup_vs_torch_fp32 "
    "speedup_vs_onnx_fp32 weight_bytes_ratio pretrain_gain_points"
)


@pytest.fixture
def run(tmp_path):
    return write_demo_run(tmp_path / "runs" / "demo")


def test_committed_results_are_in_the_promised_format_and_have_targets():
    for name, result in read_results().items():
        assert result.keys() == RESULT_KEYS
        assert all(entry.keys() == FIGURE_KEYS for entry in result["figures"].values())
        assert result["figures"].keys() <= read_targets()[name].keys()
        assert not result["commit"].endswith("-dirty")


def test_the_readme_shows_the_committed_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert command.with_table(readme, command.demo_table()) == readme


def test_every_figure_of_the_demo_has_a_target_entry_and_a_line_in_the_readme():
    assert list(read_targets()["demo"]) == list(command.TITLES) == ISSUE_2.split()


def test_a_written_result_is_read_back(tmp_path):
    made = {"a": figure(3.0, "s"), "b": figure(Interval(2.0, 1.0, 3.0), "points", 50)}
    path = write_result("x", "python -m benchmarks x", "abc", made, tmp_path)
    assert json.loads(path.read_text()).keys() == RESULT_KEYS
    assert read_results(tmp_path)["x"]["figures"] == made
    assert made["b"] == {"value": 2.0, "unit": "points", "n": 50, "low": 1.0, "high": 3.0}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"figures": {}}', '{"command":1,"commit":1,"machine":1,"date":1,"figures":{"a":{}}}']
)
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json: not a result file"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("op", "target", "value", "expected"),
    [("<=", 20, 20, "met"), ("<=", 20, 20.1, "missed"), (">=", 4, 4, "met"), (">", 0, 0, "missed"), (None, None, 1, "measured")],
)
def test_a_figure_is_judged_by_its_target(op, target, value, expected):
    assert verdict(figure(value, "s"), Target("s", 2, op, target)) == expected
    assert verdict(None, Target("s", 2, op, target)) == "not measured"


def test_the_table_shows_every_target_and_every_measured_figure(tmp_path, monkeypatch):
    made = {"demo_minutes": figure(31.5, "minutes"), "engine_accuracy": figure(Interval(85.7, 83.4, 87.7), "%", 1000)}
    write_result("demo", "c", "0123456789", {**made, "extra": figure(1.5, "s")}, tmp_path)
    monkeypatch.setattr(command, "read_results", lambda: read_results(tmp_path))
    console = Console(width=100, record=True, file=io.StringIO())
    command.show(console)
    lines = {line.split()[0]: line for line in console.export_text().splitlines() if line.strip()}
    assert all(key in lines for table in read_targets().values() for key in table)
    assert "31.5 minutes" in lines["demo_minutes"] and lines["demo_minutes"].rstrip().endswith("missed")
    assert "85.7 % (83.4 to 87.7)" in lines["engine_accuracy"]
    assert "1.5 s" in lines["extra"]
    assert lines["test_minutes"].rstrip().endswith("not measured")
    assert "01234567" in lines["demo"]


def test_the_readmes_table_has_a_line_for_each_figure(tmp_path, monkeypatch, run):
    made = {"demo_minutes": figure(14.0, "minutes"), "test_minutes": figure(9.0, "minutes"), **demo.model_figures(run)}
    write_result("demo", "python -m benchmarks demo", "0123456789", made, tmp_path)
    monkeypatch.setattr(command, "read_results", lambda: read_results(tmp_path))
    table = command.demo_table()
    assert "| speed-up over the teacher in PyTorch fp32, batch 1 | 10.8× | 10.4 to 11.2 | ≥ 6 |" in table
    assert "| drop from teacher to engine | 0.9 points | −0.2 to 2 | ≤ 2 |" in table
    assert table.count("\n| ") == 1 + len(made)
    assert "`python -m benchmarks demo`" in table
    marked = f"a\n{command.START}\nold\n{command.END}\nb\n"
    assert command.with_table(marked, table) == f"a\n{command.START}\n{table}\n{command.END}\nb\n"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(UserError, match="put the two markers back"):
        command.with_table("no markers", "table")


def test_an_unknown_benchmark_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["dmo"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: no benchmark 'dmo': did you mean 'demo'?\n"


def test_a_run_gives_every_figure_of_the_demo_but_the_times(run):
    measured = demo.model_figures(run)
    assert ["demo_minutes", "test_minutes", *measured] == ISSUE_2.split()
    assert measured["teacher_accuracy"]["value"] == 86.6
    assert measured["teacher_accuracy"]["low"] < 86.6 < measured["teacher_accuracy"]["high"]
    assert measured["engine_accuracy"]["value"] == 85.7
    assert measured["weight_bytes_ratio"]["value"] == pytest.approx(14.9 / 90.9)
    gain = measured["pretrain_gain_points"]
    assert gain["value"] == pytest.approx(4.3) and 3 < gain["low"] < 4.3 < gain["high"] < 6 and gain["n"] == 1000


def test_pretraining_is_only_compared_on_the_same_rows(run):
    write_predictions(run / demo.RANDOM, 700, 999)
    with pytest.raises(UserError, match="tested on different rows"):
        demo.model_figures(run)
    (run / demo.RANDOM / "predictions.jsonl").unlink()
    with pytest.raises(UserError, match=r"predictions\.jsonl: missing"):
        demo.model_figures(run)


def test_a_run_without_a_compared_engine_gives_no_figures(tmp_path):
    write_stage(tmp_path / "demo", "teacher", "finetune")
    with pytest.raises(UserError, match="no finished export stage"):
        demo.model_figures(tmp_path / "demo")


def test_reusing_a_run_records_nothing(run, capsys, monkeypatch):
    monkeypatch.setattr(demo, "write_result", lambda *_: pytest.fail("recorded"))
    demo.main(["--reuse", str(run)])
    assert json.loads(capsys.readouterr().out).keys() <= set(ISSUE_2.split())


def test_a_fresh_environment_has_no_virtual_environment_and_no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", "/venv")
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setenv("PATH", f"/venv/bin{os.pathsep}/usr/bin")
    monkeypatch.setenv("VIRTUAL_ENV", "/venv")
    environment = demo.fresh_environment(tmp_path)
    assert environment["PATH"] == "/usr/bin" and "VIRTUAL_ENV" not in environment
    assert environment["XDG_CACHE_HOME"] == str(tmp_path)


def test_ports_of_the_query_are_free_and_different():
    ports = demo_query.free_ports(2)
    assert len(set(ports)) == 2
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_server_that_ends_is_reported_with_its_last_line():
    dies = [sys.executable, "-c", "print('first'); print('error: port 80 is in use'); raise SystemExit(2)"]
    with pytest.raises(UserError, match="ended with status 2: error: port 80 is in use"), demo_query.served(dies, lambda: False):
        pass


def test_a_server_is_stopped_when_the_query_is_done(tmp_path):
    pid = tmp_path / "pid"
    program = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    with demo_query.served([sys.executable, "-c", program], lambda: pid.exists() and pid.read_text()):
        number = int(pid.read_text())
        assert Path(f"/proc/{number}").exists()
    assert not Path(f"/proc/{number}").exists()


def test_the_summary_puts_the_teacher_beside_the_engine(run):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(demo_query.summary(read_run(run)))
    text = console.export_text()
    assert "86.6 (84.3 to 88.6)" in text and "85.7 (83.4 to 87.7)" in text
    assert "14.10" in text and "1.30" in text
    assert "10.8 (10.4 to 11.2)" in text


def test_a_commit_is_named_in_full():
    assert len(figures.head().removesuffix("-dirty")) == 40
