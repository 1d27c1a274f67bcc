"""The contract of a stage: complete or absent, skipped when unchanged, gone on with when interrupted."""

import errno
import json
import os
import shutil
import signal

import pytest

from engine import hashes
from engine.config import FileRef, ModelRef, Strict, load_recipe
from engine.errors import PREEMPTED, USER_ERROR, UserError, disk_full
from engine.stages import heartbeat, rank
from engine.stages.stage import Stage, discard, hash_directory, made_once, publish, read_stage


class CopyConfig(Strict):
    """A stage that copies a file, after another stage."""

    source: FileRef
    after: ModelRef | None = None
    note: str = ""


TEXT = "name: tiny\nstages:\n  first: {copy: {source: in.txt}}\n  second: {copy: {source: in.txt, after: first}}\n"


@pytest.fixture
def make(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT)
    (tmp_path / "in.txt").write_text("one")

    def make(name="first", *overrides):
        return Stage(load_recipe(tmp_path / "recipe.yaml", list(overrides), tmp_path / "runs"), name, CopyConfig)

    return make


def run(stage, text="done"):
    stage.begin()
    (stage.output / "result.txt").write_text(text)
    stage.complete(metrics={"validation": {"loss": 1.0}})


def test_a_finished_stage_holds_its_files_and_their_hashes_and_nothing_else_is_left(make):
    stage = make()
    run(stage)
    record = read_stage(stage.directory)
    assert record["files"] == hash_directory(stage.directory, skip=("stage.json",))
    assert record["inputs"]["source"]["reference"] == "in.txt"
    assert record["fingerprint"] == stage.fingerprint
    assert record["metrics"] == {"validation": {"loss": 1.0}}
    assert [path.name for path in stage.directory.parent.iterdir()] == ["first"]


def test_a_stage_that_did_not_complete_is_absent(make):
    stage = make()
    stage.begin()
    (stage.output / "result.txt").write_text("half")
    assert not stage.directory.exists()
    assert read_stage(stage.directory) is None
    assert not make().finished()


def test_a_new_result_replaces_the_old_one_as_a_whole(make):
    run(make())
    again = make("first", "first.note=again")
    again.begin()
    (again.output / "other.txt").write_text("new")
    assert (again.directory / "result.txt").read_text() == "done"
    again.complete()
    assert sorted(path.name for path in again.directory.iterdir()) == ["other.txt", "stage.json"]


def test_only_what_can_change_the_result_changes_the_fingerprint(make, tmp_path):
    stage = make()
    run(stage)
    before = stage.fingerprint
    assert make().finished()
    assert make("first", "name=tiny").fingerprint == before
    (tmp_path / "recipe.yaml").write_text("# a comment\n" + TEXT)
    assert make().finished()
    assert make("first", "seed=1").fingerprint != before
    assert make("first", "first.note=x").fingerprint != before
    (tmp_path / "in.txt").write_text("two")
    assert make().fingerprint != before
    assert not make().finished()


def test_a_stage_is_run_again_after_the_one_that_it_reads_has_changed(make):
    run(make())
    run(make("second"))
    assert make("second").finished()
    shutil.rmtree(make().directory)
    run(make(), "something else")
    assert not make("second").finished()


def test_an_input_is_hashed_once_for_all_processes_of_a_run_and_again_when_it_has_changed(make, tmp_path, monkeypatch):
    read = []
    plain = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: read.append(path.name) or plain(path))
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    monkeypatch.setattr(hashes, "_known", {})
    first = make().inputs
    hashes.leave(tmp_path)
    assert make().inputs == first
    monkeypatch.setattr(hashes, "_known", {})  # a rank that has just started
    monkeypatch.setenv(heartbeat.DIRECTORY, str(tmp_path))
    assert make().inputs == first
    assert read == ["in.txt"]
    (tmp_path / "in.txt").write_text("two")
    os.utime(tmp_path / "in.txt", ns=(1, 1))
    assert make().inputs != first
    assert read == ["in.txt", "in.txt"]


def test_the_hash_of_a_file_that_has_just_been_written_is_not_kept(make, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_known", {})
    assert make().inputs["source"]["sha256"]
    assert hashes._known == {}


def test_a_stage_says_which_one_it_waits_for(make):
    with pytest.raises(UserError, match="stage 'second' needs stage 'first', which has not finished"):
        make("second").finished() or make("second").fingerprint
    with pytest.raises(UserError, match="no stage 'frist': did you mean 'first'"):
        make("frist")


def test_a_missing_input_is_named_with_the_line_of_the_recipe(make, tmp_path):
    (tmp_path / "in.txt").unlink()
    with pytest.raises(UserError, match=r"recipe.yaml:3: .*in.txt: no such file"):
        _ = make().fingerprint


@pytest.mark.parametrize("damage", ["remove", "shorten"])
def test_a_result_that_lost_a_file_is_not_finished(make, damage):
    stage = make()
    run(stage)
    path = stage.directory / "result.txt"
    path.unlink() if damage == "remove" else path.write_text("d")
    assert not make().finished()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stage": 1}'])
def test_a_damaged_record_is_named_with_the_way_out(make, text):
    stage = make()
    run(stage)
    (stage.directory / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"remove .*first to run the stage again"):
        make().finished()


def test_an_interrupted_run_of_the_same_work_keeps_what_it_has(make):
    stage = make()
    stage.begin()
    (stage.partial / "checkpoints").mkdir()
    (stage.output / "half.txt").write_text("half")
    make().begin()
    assert (stage.partial / "checkpoints").exists()
    assert not (stage.output / "half.txt").exists()


def test_an_interrupted_run_of_other_work_is_not_thrown_away_silently(make):
    stage = make()
    stage.begin()
    (stage.partial / "checkpoints").mkdir()
    other = make("first", "first.note=other")
    with pytest.raises(UserError, match=r"with other settings \(changed: note\): undo the change to go on, or add --restart"):
        other.begin()
    other.abandon()
    assert (stage.partial / "checkpoints").exists()
    other.restart = True
    other.begin()
    assert not (stage.partial / "checkpoints").exists()


@pytest.mark.parametrize(("kept", "stays"), [("checkpoints/step-00000002", True), ("corpus/train", True), ("tokenizer", False)])
def test_a_failed_run_leaves_nothing_but_what_the_next_one_goes_on_from(make, kept, stays):
    stage = make()
    stage.begin()
    (stage.partial / kept).mkdir(parents=True)
    stage.abandon()
    assert stage.partial.exists() == stays
    assert stage.recipe.runs.exists() == stays
    assert not stage.output.exists()


def test_publishing_survives_the_leftovers_of_one_that_was_killed(tmp_path):
    for name in ("new", "target", "target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish(tmp_path / "new", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "new"


# How a process of a stage ends.


@pytest.fixture
def records(tmp_path, monkeypatch):
    directory = tmp_path / "records"
    directory.mkdir()
    monkeypatch.setenv(rank.ERROR_DIRECTORY, str(directory))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rank, "die_with_parent", lambda: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield directory
    for number, handler in before.items():
        signal.signal(number, handler)


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("recipe.yaml:3: wrong"), USER_ERROR, "recipe.yaml:3: wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), USER_ERROR, "disk full while writing a.bin"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
            USER_ERROR,
            "disk full while writing runs",
        ),
        (SystemExit(PREEMPTED), PREEMPTED, ""),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("broken"), 1, "ValueError: broken"),
    ],
)
def test_the_record_of_a_rank_tells_why_it_ended(records, capsys, error, status, message):
    with pytest.raises(SystemExit) as stop:
        rank.run_rank(failing(error), "runs")
    assert stop.value.code == status
    (record,) = rank.read_records(records)
    assert (record.rank, record.status) == (1, status)
    assert message in record.message
    assert ("Traceback" in record.message) == (status == 1)
    assert capsys.readouterr().err == ""


def test_a_rank_that_nobody_keeps_a_record_of_speaks_for_itself(records, capsys, monkeypatch):
    monkeypatch.delenv(rank.ERROR_DIRECTORY)
    with pytest.raises(SystemExit):
        rank.run_rank(failing(UserError("recipe.yaml:3: wrong")), "runs")
    assert capsys.readouterr().err == "error: recipe.yaml:3: wrong\n"


def test_a_rank_whose_record_is_cleaned_away_still_succeeds_or_speaks_for_itself(records, capsys):
    rank.run_rank(lambda: shutil.rmtree(records), "runs")
    records.mkdir()

    def work():
        shutil.rmtree(records)
        raise UserError("recipe.yaml:3: wrong")

    with pytest.raises(SystemExit):
        rank.run_rank(work, "runs")
    assert capsys.readouterr().err == "error: recipe.yaml:3: wrong\n"


def test_a_rank_without_an_end_was_killed(records):
    rank.run_rank(lambda: None, "runs")
    assert rank.read_records(records)[0].status == 0
    seen = []
    rank.run_rank(lambda: seen.append(rank.read_records(records)[0].status), "runs")
    assert seen == [None]


def test_the_end_of_a_rank_takes_no_more_space_than_its_beginning(records):
    sizes = []

    def work():
        sizes.append((records / "rank1.json").stat().st_size)
        raise ValueError("\N{SNOWMAN}" * 100_000)

    with pytest.raises(SystemExit):
        rank.run_rank(work, "runs")
    assert (records / "rank1.json").stat().st_size == sizes[0]
    assert rank.read_records(records)[0].message.endswith("\N{SNOWMAN}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_there_is_anything_to_save_ends_the_process_at_once(records, number):
    with pytest.raises(SystemExit) as stop:
        rank.run_rank(lambda: signal.raise_signal(number), "runs")
    assert stop.value.code == PREEMPTED


def test_a_full_disk_is_known_behind_other_libraries_errors():
    from shutil import Error

    assert disk_full(Error([("a", "b", "[Errno 28] No space left on device: 'b'")]))
    assert disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert not disk_full(OSError(errno.ENOENT, "No such file or directory"))
    assert not disk_full(json.JSONDecodeError("bad", "", 0))


def test_a_directory_that_is_discarded_loses_its_name_before_its_files(tmp_path, monkeypatch):
    path = tmp_path / "step-00000002"
    path.mkdir()
    (path / "state.json").write_text("{}")

    def killed(directory, **named):
        if directory.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("engine.stages.stage.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(path)
    assert not path.exists()


def test_stages_share_what_follows_from_the_same_keys_and_the_same_bytes(make, tmp_path):
    first = make().shared("source")
    run(make())
    assert make("second").shared("source") == first
    assert make("first", "first.note=other").shared("source") == first
    assert make("first", "first.note=other").shared("source", "note") != make().shared("source", "note")
    (tmp_path / "in.txt").write_text("two")
    assert make().shared("source") != first


def test_what_is_made_once_is_complete_or_absent(tmp_path):
    def fail(part):
        (part / "half").write_text("")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        made_once(tmp_path / "rows", fail)
    assert list(tmp_path.iterdir()) == []
    made_once(tmp_path / "rows", lambda part: (part / "whole").write_text("1"))
    made_once(tmp_path / "rows", fail)  # it is there already
    assert [path.name for path in tmp_path.rglob("*")] == ["rows", "whole"]


def test_of_two_that_make_the_same_at_once_the_first_to_finish_stays(tmp_path):
    def overtaken(part):
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "first").write_text("")
        (part / "second").write_text("")

    made_once(tmp_path / "rows", overtaken)
    assert [path.name for path in tmp_path.rglob("*")] == ["rows", "first"]
