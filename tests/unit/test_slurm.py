"""Batch jobs without a Slurm: the scripts run against stand-ins of its commands that write down how they were called."""

import os
import shlex
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.config import load_recipe
from engine.errors import NODE_FAILED, PREEMPTED, USER_ERROR, UserError
from launch.points import expand_sweep, split_values
from launch.recipe import load_stages
from launch.slurm.script import Batch, BatchOptions, Task, minutes
from tests.recipes import write_recipe
from tests.unit.test_recipe import CHAIN

STAND_INS = {
    # One task after the other, each with the number of its node.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        highest=0
        for node in ${NODES:-0 1}; do
          SLURM_NODEID=$node "$@" || { status=$?; ((status < highest)) || highest=$status; }
        done
        exit $highest""",
    "bothways": """
        printf '%s\\0' "$@" >>"$ARGUMENTS"
        if [[ " $* " == *" --preflight "* ]]; then
          [ -z "${BAD:-}" ] || { echo "$BAD" >"$RECORDS/bad-nodes"; exit 76; }
          exit "${PREFLIGHT_STATUS:-0}"
        fi
        [ -z "${KILLED_BY:-}" ] || kill -$KILLED_BY $$
        status=STATUS_$SLURM_NODEID
        exit "${!status:-0}" """,
    "scontrol": """
        echo "scontrol $*" >>"$CALLS"
        case $1 in
          requeue) exit "${REQUEUE_STATUS:-0}" ;;
          show) case $2 in
            hostnames) echo localhost ;;
            job) echo "JobId=17 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
          esac ;;
        esac""",
    "sbatch": 'echo "sbatch $*" >>"$CALLS"; [ -z "${SBATCH_FAILS:-}" ] || exit 1; echo "99;cluster"',
    "squeue": 'echo "${WAITING:-}"',
    "scancel": 'echo "scancel $*" >>"$CALLS"',
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """A directory with the stand-ins."""
    directory = tmp_path_factory.mktemp("bin")
    for name, text in STAND_INS.items():
        (directory / name).write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
        (directory / name).chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), CHAIN)


def stage_of(recipe, name):
    return next(stage for stage in load_stages(load_recipe(recipe)) if stage.name == name)


def batch(recipe, runs, tasks=None, restart=False, **options):
    # In a container the command is `bothways` from the PATH, which is the stand-in.
    options = BatchOptions(**{"container_image": "image.sqsh", "nodes": 2, **options})
    return Batch(recipe, "tiny", runs, tasks or [Task(runs / "tiny", ())], options, restart)


class Job:
    """A script that is run as Slurm would run it."""

    def __init__(self, directory, commands, text, *arguments, **variables):
        script, self.calls_file, self.arguments_file = (directory / name for name in ("script", "calls", "arguments"))
        script.write_text(text)
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "CALLS": str(self.calls_file)}
        job |= {"ARGUMENTS": str(self.arguments_file), "PATH": f"{commands}:{os.environ['PATH']}"}
        self.done = subprocess.run(
            ["bash", script, *arguments], env={**os.environ, **job, **variables}, capture_output=True, text=True, timeout=30
        )
        self.script = script

    @property
    def calls(self):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [line for line in lines if not line.startswith("scontrol show")]

    @property
    def arguments(self):
        return self.arguments_file.read_text().split("\0")[:-1]


def words(directory):
    return [line.split(maxsplit=2)[1:] for line in (directory / "events").read_text().splitlines()]


TABLE = {
    "finished": ({}, 0, [], "finished"),
    "asked to stop": ({"STATUS_0": PREEMPTED, "STATUS_1": PREEMPTED}, PREEMPTED, ["scontrol requeue 17"], "requeued:"),
    "another node lost": ({"STATUS_0": NODE_FAILED, "STATUS_1": 137}, 137, [], "failed"),
    "a node lost": ({"STATUS_0": NODE_FAILED, "STATUS_1": NODE_FAILED}, NODE_FAILED, ["scontrol requeue 17"], "requeued:"),
    "a mistake": ({"STATUS_0": USER_ERROR, "STATUS_1": NODE_FAILED}, USER_ERROR, [], "failed"),
    "a crash": ({"STATUS_0": NODE_FAILED, "STATUS_1": 1}, 1, [], "failed"),
    "killed": ({"STATUS_0": 137}, 137, [], "failed"),
    "too often": ({"STATUS_0": PREEMPTED, "SLURM_RESTART_COUNT": 3}, PREEMPTED, [], "failed"),
    "once more": ({"STATUS_0": PREEMPTED, "SLURM_RESTART_COUNT": 2}, PREEMPTED, ["scontrol requeue 17"], "requeued:"),
    "by scancel": ({"STATUS_0": PREEMPTED, "JOB_STATE": "CANCELLED"}, PREEMPTED, [], "started"),
    "Slurm requeues": ({"STATUS_0": PREEMPTED, "JOB_STATE": "PENDING"}, PREEMPTED, [], "started"),
}


@pytest.mark.parametrize("case", TABLE)
def test_only_what_another_try_can_mend_is_queued_again(recipe, tmp_path, commands, case):
    variables, status, calls, word = TABLE[case]
    text = batch(recipe, tmp_path / "runs", max_requeues=3).script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, **{name: str(value) for name, value in variables.items()})
    assert (job.done.returncode, job.calls) == (status, calls)
    assert words(tmp_path / "runs/tiny/jobs/17")[-1][0] == word
    assert job.done.stderr == ""


def test_a_job_that_slurm_has_requeued_too_often_does_not_start(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs", max_requeues=3).script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, "2", SLURM_RESTART_COUNT="2")
    assert job.done.returncode == 1
    assert not job.calls_file.exists()
    assert words(tmp_path / "runs/tiny/jobs/17") == [["failed", "1 given up after 3 requeues (--max-requeues)"]]


def test_a_cancelled_job_is_not_queued_again(recipe, tmp_path, commands):
    (tmp_path / "runs/tiny/jobs/17").mkdir(parents=True)
    (tmp_path / "runs/tiny/jobs/17/cancelled").touch()
    text = batch(recipe, tmp_path / "runs").script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, STATUS_0=str(PREEMPTED))
    assert job.done.returncode == PREEMPTED
    assert words(tmp_path / "runs/tiny/jobs/17")[-1] == ["cancelled"]


def test_where_requeueing_is_refused_a_new_job_takes_over_and_what_waits_waits_for_it(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs", resources={"exclude": "n7"}).script(stage_of(recipe, "teacher"))
    record = tmp_path / "runs/tiny/jobs/17"
    record.mkdir(parents=True)
    (record / "job.json").write_text("{}")
    waiting = "18 afterok:17(unfulfilled)\n19 afterok:18(unfulfilled)\n20 afterok:170(unfulfilled)"
    job = Job(
        tmp_path, commands, text, "1", STATUS_0=str(PREEMPTED), REQUEUE_STATUS="1", WAITING=waiting, SLURM_RESTART_COUNT="2"
    )
    assert job.calls == [
        "scontrol requeue 17",
        f"sbatch --parsable {job.script} 4",
        "scontrol update JobId=18 Dependency=afterok:99",
    ]
    assert words(record)[-1] == ["resubmitted", "99"]
    assert (tmp_path / "runs/tiny/jobs/99/job.json").exists()


def test_a_stage_that_can_be_neither_requeued_nor_submitted_again_says_so(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs").script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, STATUS_0=str(PREEMPTED), REQUEUE_STATUS="1", SBATCH_FAILS="1")
    assert job.done.returncode == PREEMPTED
    assert words(tmp_path / "runs/tiny/jobs/17")[-1] == ["failed", "75 asked to stop; neither requeued nor submitted again"]


def preflight(recipe, tmp_path, commands, **variables):
    text = batch(recipe, tmp_path / "runs", preflight=True, resources={"exclude": "n7"}).script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, NODES="0", **variables)
    return job, job.arguments.count("launch"), words(tmp_path / "runs/tiny/jobs/17")[-1]


def test_a_bad_node_is_left_out_when_the_job_is_requeued_and_the_stage_waits_for_that(recipe, tmp_path, commands):
    job, launches, told = preflight(recipe, tmp_path, commands, BAD="n2")
    assert job.calls == ["scontrol requeue 17", "scontrol update JobId=17 ExcNodeList=n7,n2"]
    assert (launches, told) == (1, ["requeued:", "bad nodes: n2"])
    job, _, _ = preflight(recipe, tmp_path, commands, BAD="n3", SLURM_RESTART_COUNT="1", REQUEUE_STATUS="1")
    assert job.calls[-1] == f"sbatch --parsable --exclude=n7,n2,n3 {job.script} 2"


def test_after_the_preflight_the_stage_runs_or_the_job_ends_as_the_preflight_did(recipe, tmp_path, commands):
    job, launches, told = preflight(recipe, tmp_path, commands)
    assert (job.done.returncode, launches, told) == (0, 2, ["finished"])
    (tmp_path / "arguments").unlink()
    job, launches, told = preflight(recipe, tmp_path, commands, PREFLIGHT_STATUS="1")
    assert (job.done.returncode, launches, told) == (1, 1, ["failed", "1"])
    assert "--preflight" not in batch(recipe, tmp_path / "runs", preflight=True).script(stage_of(recipe, "int8"))


def test_restart_throws_the_interrupted_run_away_in_the_first_attempt_only(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs", restart=True).script(stage_of(recipe, "teacher"))
    assert "--restart" in Job(tmp_path, commands, text).arguments
    (tmp_path / "arguments").unlink()
    assert "--restart" not in Job(tmp_path, commands, text, SLURM_RESTART_COUNT="1").arguments


def test_every_task_of_an_array_runs_its_own_settings_in_its_own_directory(recipe, tmp_path, commands):
    tasks = [
        Task(tmp_path / f"runs/tiny-{number}", (f"teacher.train.steps={number}", f"name=tiny-{number}")) for number in (1, 2)
    ]
    text = batch(recipe, tmp_path / "runs", tasks).script(stage_of(recipe, "teacher"))
    assert "#SBATCH --array=0-1\n" in text
    job = Job(tmp_path, commands, text, SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="1", NODES="0", STATUS_0=str(PREEMPTED))
    start = job.arguments.index("--set")
    assert job.arguments[start : start + 4] == ["--set", "teacher.train.steps=2", "--set", "name=tiny-2"]
    assert job.calls == ["scontrol requeue 17_1"]
    assert (tmp_path / "runs/tiny-2/jobs/17_1/events").exists()


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc")), min_size=1)


@given(overrides=st.lists(TEXT, max_size=3), option=TEXT)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_reaches_the_command_as_it_was_given(recipe, tmp_path, commands, overrides, option):
    runs = tmp_path / "a run's $HOME directory"
    text = batch(recipe, runs, [Task(runs / "tiny", tuple(overrides))], node_options=(option,)).script(
        stage_of(recipe, "teacher")
    )
    (tmp_path / "arguments").unlink(missing_ok=True)
    arguments = Job(tmp_path, commands, text, NODES="0").arguments
    assert arguments[:6] == ["launch", str(recipe), "--stage", "teacher", "--runs", str(runs)]
    assert arguments[6 : 6 + 2 * len(overrides)] == [part for override in overrides for part in ("--set", override)]
    assert arguments[-3:] == [option, "--node-rank", "0"]


@given(value=TEXT)
@example(value="0\u2028")
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_option_with_any_text_is_one_word_of_its_sbatch_line(recipe, value):
    if not value.strip():
        return
    text = batch(recipe, Path("runs"), resources={"constraint": value}).script(stage_of(recipe, "teacher"))
    # sbatch ends a line at a newline alone, not at everything that str.splitlines takes for one.
    lines = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.split("\n") if line.startswith("#SBATCH")]
    assert [f"--constraint={value}"] in lines


@pytest.mark.parametrize("name", CHAIN)
def test_the_script_of_every_kind_of_stage_is_valid_bash(recipe, tmp_path, name):
    stage = stage_of(recipe, name)
    text = batch(recipe, tmp_path / "runs", gpus_per_node=4, setup=("module load cuda",)).script(stage)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    trains = stage.kind in ("pretrain", "finetune", "distill")
    assert f"#SBATCH --nodes={2 if trains or stage.kind == 'corpus' else 1}\n" in text
    gpus = "" if stage.kind == "corpus" else f"#SBATCH --gpus-per-node={4 if trains else 1}\n"
    assert gpus in text and ("#SBATCH --gpus-per-node" in text) == bool(gpus)
    assert ("--gpus-per-node 4" in text) == trains


def test_set_up_lines_come_before_the_launcher_and_a_failing_one_ends_the_job(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs", setup=("export WHERE=here", "false")).script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text)
    assert job.done.returncode == 1
    assert not job.calls_file.exists()
    assert words(tmp_path / "runs/tiny/jobs/17")[-1] == ["failed", "1 a set-up line failed: false"]
    with pytest.raises(UserError, match="--setup: with these lines the script is not valid bash"):
        batch(recipe, tmp_path / "runs", setup=("if true",)).script(stage_of(recipe, "teacher"))


def test_a_request_to_stop_during_the_set_up_queues_the_job_again(recipe, tmp_path, commands):
    text = batch(recipe, tmp_path / "runs", setup=("kill -USR1 $$; sleep 0.1",)).script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text)
    assert (job.done.returncode, job.calls) == (PREEMPTED, ["scancel --signal=USR1 17", "scontrol requeue 17"])
    assert not job.arguments_file.exists()
    assert [word for word, *_ in words(tmp_path / "runs/tiny/jobs/17")] == ["started", "stopping", "requeued:"]


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_request_to_stop_that_comes_before_the_launcher_listens_queues_the_job_again(recipe, tmp_path, commands, number):
    text = batch(recipe, tmp_path / "runs").script(stage_of(recipe, "teacher"))
    job = Job(tmp_path, commands, text, KILLED_BY=number)
    assert (job.done.returncode, job.calls) == (PREEMPTED, ["scontrol requeue 17"])


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 30), ("1:30", 1.5), ("4:00:00", 240), ("2-12", 3600), ("1-0:30", 1470), ("1-1:1:30", 1501.5), ("UNLIMITED", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(time, expected):
    assert minutes(time) == expected


def test_a_sweep_is_every_combination_with_a_directory_of_its_own():
    variants = expand_sweep(["teacher.train.learning_rate=1e-5, 3e-5", "teacher.train.betas=[0.9,0.99],[0.8,0.9]"])
    assert [variant.overrides for variant in variants] == [
        ("teacher.train.learning_rate=1e-5", "teacher.train.betas=[0.9,0.99]"),
        ("teacher.train.learning_rate=1e-5", "teacher.train.betas=[0.8,0.9]"),
        ("teacher.train.learning_rate=3e-5", "teacher.train.betas=[0.9,0.99]"),
        ("teacher.train.learning_rate=3e-5", "teacher.train.betas=[0.8,0.9]"),
    ]
    assert len({variant.suffix for variant in variants}) == 4
    assert variants[0].suffix == "learning_rate-1e-5-betas-_0.9_0.99_"


@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=1).map(str) | st.integers().map(str) | st.sampled_from(["'a, b'", "{x: 1, y: 2}"])
    )
)
def test_joined_values_split_into_the_same_values(values):
    assert split_values(",".join(values)) == (values or [""])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["learning_rate"], "write it as key=value,value"),
        (["a.b="], "write it as key=value,value"),
        (["a.b=1,,2"], "write it as key=value,value"),
        (["name=x,y"], "the name tells the runs apart"),
        (["a.b=1,2", "a.b=3"], "'a.b' comes twice"),
        (["a.b=1,1"], "two combinations would both write to a run named …-b-1"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep, message):
    with pytest.raises(UserError, match=message):
        expand_sweep(sweep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "sbatch is not on the PATH"),
        (("--partition", ""), "--partition '': empty"),
        (("--sbatch", "mail"), "--sbatch 'mail': give one option of sbatch"),
        (("--time", "1:30", "--signal-before", "90"), "--time 1:30: not longer than --signal-before 90 s"),
        (("--nodes", "-1"), "Invalid value for '--nodes'"),
        (("--max-requeues", "-1"), "Invalid value for '--max-requeues'"),
        (("--sweep", "teacher.train.learning=1,2"), "unknown key 'learning': did you mean 'learning_rate'?"),
        (("--sweep", "tutor.train.steps=1,2"), "no stage 'tutor'"),
        (("--set", "teacher.train.steps=0"), "stages.teacher.finetune.train.steps"),
        (("--nodes", "3", "--processes-per-node", "1"), "train.batch_size=8 is not a multiple of micro batch 2 × processes 3"),
        (("--node-rank", "0"), "--node-rank: the job takes it from Slurm"),
        (("--main-port", "4000"), "--main-port: the job takes it from Slurm"),
        (("--json",), "--json: what the nodes' --preflight finds goes to the job's log"),
        (("--gpus-per-node", "2", "--processes-per-node", "4"), "are the same number: give one of them"),
        (("--max-restarts", "60000"), "it has to lie between 1024 and"),
        (("--container-mounts", "/a:/b"), "--container-mounts /a:/b: add --container-image"),
        (("--sbatch=--array=0-3",), "--sbatch --array=0-3: an array comes from --sweep"),
        (("--sbatch=-xn1",), "--sbatch -xn1: say --exclude"),
        (("--time", "0"), "sbatch is not on the PATH"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_submitted(call, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    recipe = write_recipe(tmp_path)
    status, _, err = call("launch", recipe, "--runs", tmp_path / "runs", "--slurm", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_an_option_of_slurm_without_slurm_is_refused(call, tmp_path):
    status, _, err = call("launch", write_recipe(tmp_path), "--partition", "gpu")
    assert (status, err) == (2, "error: --partition is for batch jobs: add --slurm\n")
    status, _, err = call("launch", write_recipe(tmp_path / "other"), "--max-requeues", "3")
    assert (status, err) == (2, "error: --max-requeues is for batch jobs: add --slurm\n")


def test_the_dry_run_needs_no_slurm_and_shows_the_whole_chain(call, tmp_path):
    recipe = write_recipe(tmp_path, CHAIN)
    status, out, err = call("launch", recipe, "--runs", tmp_path / "runs", "--slurm", "--dry-run", "--set", "base.train.steps=3")
    assert (status, err) == (0, "")
    assert out.count("#!/bin/bash") == len(CHAIN)
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    assert "# ---- text.sbatch, submitted by: job_text=$(sbatch --parsable text.sbatch)\n" in out
    chained = "sbatch --parsable --dependency=afterok:$job_base --kill-on-invalid-dep=yes teacher.sbatch"
    assert f"# ---- teacher.sbatch, submitted by: job_teacher=$({chained})\n" in out
    assert not (tmp_path / "runs").exists()


def test_all_recipes_of_the_project_can_be_submitted(call):
    for recipe in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        stages = yaml.safe_load(recipe.read_text())["stages"]
        status, out, err = call("launch", recipe, "--runs", "no-runs", "--slurm", "--dry-run")
        assert (status, out.count("#SBATCH --job-name")) == (0, len(stages)), err
