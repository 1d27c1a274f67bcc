"""The part of the command line that deals with batch jobs: the options of `launch --slurm`; `status`, `logs` and `cancel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import UserError
from launch.nodes.place import HEARTBEAT_LIMIT, PORT
from launch.slurm import MAX_REQUEUES, SIGNAL_BEFORE

Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories lie.")]
RunOrRecipe = Annotated[
    Path, typer.Argument(metavar="RUN|RECIPE", help="A run directory, as in runs/demo, or a recipe.", show_default=False)
]
OneStage = Annotated[str | None, typer.Option("--stage", help="This stage alone.", show_default=False)]


def _slurm(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Slurm", show_default=more.pop("show_default", False), **more)


Slurm = Annotated[bool, _slurm("Submit one batch job for each stage that is not finished, in a chain.", "--slurm")]
Text = str | None
Account = Annotated[Text, _slurm("Account to charge.")]
Partition = Annotated[Text, _slurm("Partition.")]
Qos = Annotated[Text, _slurm("Quality of service.")]
Constraint = Annotated[Text, _slurm("Features that the nodes must have.")]
Gres = Annotated[Text, _slurm("Generic resources of each node, as in gpu:a100:4.")]
Exclude = Annotated[Text, _slurm("Nodes not to use.")]
Time = Annotated[Text, _slurm("Time limit of each job, as in 4:00:00.")]
CpusPerTask = Annotated[int | None, _slurm("CPU cores on each node.", min=1)]
Mem = Annotated[Text, _slurm("Host memory of each node, as in 200G; 0: all of it.")]
JobName = Annotated[Text, _slurm("Beginning of the jobs' names.", show_default="the recipe's name")]
Sbatch = Annotated[
    list[str], _slurm("Any other option of sbatch, as in --sbatch=--mail-type=END; may be repeated.", metavar="OPTION")
]
Setup = Annotated[
    list[str], _slurm('Shell line that prepares the job, as in "module load cuda"; may be repeated.', metavar="LINE")
]
ContainerImage = Annotated[Text, _slurm("Image to run in (srun with the plugin pyxis).")]
ContainerMounts = Annotated[Text, _slurm("Mounts of the container, as in /data:/data.")]
MaxRequeues = Annotated[int, _slurm("How often a job that was stopped goes on.", min=0, show_default=True)]
SignalBefore = Annotated[
    int, _slurm("Seconds before the time limit at which a checkpoint is saved.", min=1, max=65535, show_default=True)
]
Sweep = Annotated[
    list[str],
    _slurm(
        "Run the recipe with each value, or each point of a file, as array jobs; repeat it for all combinations.",
        metavar="A.B=C,D,…",
    ),
]
TestOnly = Annotated[bool, _slurm("Ask sbatch whether and when the jobs would start.", "--test-only")]
Wait = Annotated[bool, _slurm("Stay until the jobs have ended and tell how.", "--wait")]


SHELL = "ssh {host}"
FROM_SLURM: dict[str, Any] = {
    "node_rank": None,
    "main_address": None,
    "main_port": PORT,
    "records": None,
    "hosts": None,
    "shell": SHELL,
    "env": [],
}
"""Options whose values a job finds by itself, with their defaults."""
RESOURCES = ("account", "partition", "qos", "constraint", "gres", "exclude", "time", "cpus_per_task", "mem")
"""Options that sbatch takes under the same names."""
OTHERS = ("job_name", "sbatch", "setup", "container_image", "container_mounts", "sweep", "test_only", "wait")
"""Options that make sense for batch jobs only, beside the resources."""


def launch_nodes(given: dict[str, Any]) -> None:
    """Runs this node of a recipe, checks it, starts all nodes from here, or shows their commands.

    Args:
        given: the options of `bothways launch`.

    Raises:
        UserError: bad input.
        StageError: a stage or a node failed, or the command was asked to stop.
    """
    from launch.nodes.hosts import attend, read_hosts, run_hosts, show_commands, show_stages
    from launch.nodes.place import Place, Supervision, check_ports, place_of

    attend()
    nodes, rank, address = given["nodes"], given["node_rank"], given["main_address"]
    numbers = (given["main_port"], given["gpus_per_node"], given["processes_per_node"])
    if given["as_json"] and not given["preflight"]:
        raise UserError("--json prints what --preflight finds: add --preflight")
    hosts = read_hosts(given["hosts"], nodes, rank) if given["hosts"] is not None else None
    if given["env"] and not hosts:
        raise UserError("--env carries variables to the nodes of --hosts: here every node has its own environment")
    if hosts:
        nodes, address = len(hosts), address or hosts[0]
    if hosts or given["dry_run"]:
        check_ports(given["main_port"], given["max_restarts"])
        ranks = [rank] if rank is not None else range(nodes)
        places: list[Place] = [place_of(nodes, rank, address, *numbers) for rank in ranks]
        stages = _check(given, places[0])
        if hosts and not given["dry_run"]:
            run_hosts(_node_arguments(given), places, hosts, given["shell"], given["env"])
        else:
            show_commands(_node_arguments(given), places, hosts, given["shell"], given["env"])
            show_stages(stages, given["overrides"], places)
        return
    place = place_of(nodes, rank, address, *numbers)
    supervision = Supervision(given["max_restarts"], given["heartbeat_limit"], given["records"])
    if given["preflight"]:
        from engine.config import load_recipe
        from launch.nodes.preflight import run_preflight

        load_recipe(given["recipe"], given["overrides"], given["runs"])  # a mistake in it shows before anything is measured
        place.check(supervision)
        run_preflight(place, supervision.heartbeat_limit, supervision.records, given["as_json"], print)
        return
    from launch.pipeline import run_recipe

    options = (given["recipe"], given["overrides"], given["runs"], given["stage"], given["restart"])
    run_recipe(*options, place=place, supervision=supervision)


def _check(given: dict[str, Any], place: Any) -> list[Any]:
    """Looks at the recipe before any host is asked to run it; returns the stages that are meant."""
    from engine.config import load_recipe
    from launch.check import check_recipe
    from launch.pipeline import choose_stages, require_finished
    from launch.recipe import load_stages

    recipe = load_recipe(given["recipe"], given["overrides"], given["runs"])
    stages = choose_stages(load_stages(recipe), given["stage"])
    check_recipe(recipe, stages, place)
    require_finished(recipe, stages)
    return stages


def _node_arguments(given: dict[str, Any]) -> list[str]:
    """Returns the arguments of `bothways launch` that are the same on every node."""
    arguments = [str(given["recipe"]), "--runs", str(given["runs"])]
    arguments += [part for setting in given["overrides"] for part in ("--set", setting)]
    arguments += [part for name in given["stage"] for part in ("--stage", name)]
    arguments += [_flag(name) for name in ("restart", "preflight") if given[name]] + (["--json"] if given["as_json"] else [])
    arguments += ["--records", str(given["records"])] if given["records"] else []
    numbers = (("max_restarts", 0), ("heartbeat_limit", HEARTBEAT_LIMIT))
    return arguments + [part for name, usual in numbers if given[name] != usual for part in (_flag(name), f"{given[name]:g}")]


def launch_slurm(given: dict[str, Any]) -> None:
    """Submits the jobs of a recipe, or shows what would be submitted.

    Args:
        given: the options of `bothways launch`.

    Raises:
        UserError: bad input, or sbatch refused a job.
        StageError: with --wait: a job failed.
    """
    for name, usual in FROM_SLURM.items():
        if given[name] != usual:
            raise UserError(f"{_flag(name)}: the job takes it from Slurm: leave it out with --slurm")
    if given["as_json"]:
        raise UserError("--json: what the nodes' --preflight finds goes to the job's log: leave it out with --slurm")
    from launch.nodes.place import check_ports, place_of
    from launch.slurm.jobs import wait_for
    from launch.slurm.script import BatchOptions
    from launch.slurm.submit import dry_run, prepare_submission, submit, try_submission

    # What every node would refuse when the job has come to run.
    check_ports(given["main_port"], given["max_restarts"])
    place_of(1, None, None, given["main_port"], given["gpus_per_node"], given["processes_per_node"])
    options = BatchOptions(
        resources={name.replace("_", "-"): given[name] for name in RESOURCES},
        node_options=("--max-restarts", str(given["max_restarts"]), "--heartbeat-limit", f"{given['heartbeat_limit']:g}"),
        sbatch=tuple(given["sbatch"]),
        setup=tuple(given["setup"]),
        **{name: given[name] for name in ("nodes", "gpus_per_node", "processes_per_node", "job_name", "container_image")},
        **{name: given[name] for name in ("container_mounts", "max_requeues", "signal_before", "preflight")},
    )
    submission = prepare_submission(
        given["recipe"], given["overrides"], given["runs"], given["stage"], options, given["sweep"], given["restart"]
    )
    if not submission.stages:
        print("every stage has finished: nothing to submit")
    elif given["dry_run"]:
        print(dry_run(submission), end="")
    elif given["test_only"]:
        try_submission(submission, print)
    else:
        jobs = submit(submission, print)
        print(f"see: bothways status {' '.join(str(task.run) for task in submission.batch.tasks)}", flush=True)
        if given["wait"]:
            wait_for(jobs, lambda text: print(text, flush=True))


def require_no_slurm_options(given: dict[str, Any]) -> None:
    """Raises UserError when an option for batch jobs was given without --slurm."""
    for name in (*RESOURCES, *OTHERS):
        if given[name]:
            raise UserError(f"{_flag(name)} is for batch jobs: add --slurm")
    for name, usual in (("max_requeues", MAX_REQUEUES), ("signal_before", SIGNAL_BEFORE)):
        if given[name] != usual:
            raise UserError(f"{_flag(name)} is for batch jobs: add --slurm")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def status(
    runs_or_recipes: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|RECIPE…", help="Run directories, as in runs/demo, or recipes.", show_default=False),
    ],
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show where each stage of a run stands: finished, running, waiting or failed, and why; local runs and Slurm jobs."""
    from launch.status import show, status_of

    found = {}
    for path in runs_or_recipes:
        run, names = _find(path, runs)
        found[run] = status_of(run, names)
    if as_json:
        print(json.dumps({str(run): [stage.as_json() for stage in stages] for run, stages in found.items()}, indent=1))
        return
    for run, shown in found.items():
        print(show(run, shown))


def logs(
    run: RunOrRecipe,
    stage: OneStage = None,
    rank: Annotated[int | None, typer.Option(min=0, help="What this rank printed.", show_default="the whole job's log")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is over.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Print the log of a run's latest Slurm job, or of one of its ranks."""
    from launch.slurm.jobs import show_log

    show_log(_find(run, runs)[0], stage, rank, follow)


def cancel(run: RunOrRecipe, stage: OneStage = None, runs: Runs = Path("runs")) -> None:
    """Stop a run after a checkpoint, and cancel its waiting jobs; a second time ends it at once."""
    from launch.status import cancel_run

    cancel_run(_find(run, runs)[0], stage, print)


def _find(path: Path, runs: Path) -> tuple[Path, list[str] | None]:
    """Returns the run directory that is meant, and the stages of its recipe where that is given."""
    if path.is_file():
        from engine.config import load_recipe

        recipe = load_recipe(path, [], runs)
        return recipe.runs / recipe.name, list(recipe.stages)
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory and no such recipe")
    return path, None


def register(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(epilog="Examples: `bothways status recipe.yaml` · `bothways status runs/reviews-*` · `… --json`")(status)
    app.command(epilog="Examples: `bothways logs runs/reviews --follow` · `bothways logs runs/reviews --stage teacher --rank 3`")(
        logs
    )
    app.command(epilog="Example: `bothways cancel runs/reviews --stage student`")(cancel)
