"""The command line: `bothways new|run|sweep|launch|check|plan|resume-check|predict|evaluate|serve|verify|report|doctor|…`.

Everything heavy is imported inside the commands: `bothways --help` and `bothways check` load neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import engine
from engine.errors import USER_ERROR, UserError, disk_full
from engine.terminal import ReaderGone, printing
from launch import cli_cluster as cluster
from launch import cli_data
from launch.cli_data import Engine, Json, LayoutOption, Threads
from launch.nodes.place import HEARTBEAT_LIMIT, PORT
from launch.slurm import MAX_REQUEUES, SIGNAL_BEFORE

READER_GONE = 128 + signal.SIGPIPE
"""Exit status of a command whose reader has left, as of one that dies of SIGPIPE: `bothways predict … | head -1`."""

app = typer.Typer(
    name="bothways",
    help="One recipe from raw text to a served engine: pretrain, fine-tune, distil, prune, int8, export, serve.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The directory of an export stage.", show_default=False)]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, as in runs/demo.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override a key of the recipe; may be repeated.", show_default=False)
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories lie.")]
OneStage = Annotated[list[str], typer.Option(help="Run this stage alone; may be repeated.", show_default=False)]
Restart = Annotated[bool, typer.Option("--restart", help="Throw interrupted runs away, do not go on from them.")]
MaxRestarts = Annotated[int, typer.Option(min=0, help="Start a stage's ranks again after a crash, a kill or a stall.")]
HeartbeatLimit = Annotated[float, typer.Option(min=1, help="Seconds without a sign of life that make a stall.")]


@app.command(
    epilog="Examples: `bothways run recipe.yaml` · `bothways run recipe.yaml --stage teacher --set teacher.train.epochs=1`"
)
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    stage: OneStage = [],  # noqa: B006
    runs: Runs = Path("runs"),
    restart: Restart = False,
    max_restarts: MaxRestarts = 0,
    heartbeat_limit: HeartbeatLimit = HEARTBEAT_LIMIT,
) -> None:
    """Run the stages of a recipe that are not finished.

    A finished stage whose section and inputs have not changed is skipped; one that was killed goes on from its last checkpoint.
    To run a finished stage again, remove its directory.
    """
    from launch.nodes.place import Supervision

    _run_recipe(recipe, overrides, runs, stage, restart, supervision=Supervision(max_restarts, heartbeat_limit))


def _run_recipe(*arguments: Any, **options: Any) -> None:
    from launch.pipeline import run_recipe

    with _failing_stage():
        run_recipe(*arguments, **options)


@contextlib.contextmanager
def _failing_stage() -> Iterator[None]:
    """Ends the command as a failing stage says."""
    from launch.watchdog import StageError

    try:
        yield
    except StageError as error:
        if error.details:
            print(error.details.rstrip(), file=sys.stderr)
        _fail(str(error), error.status)


@app.command(
    epilog="Examples, on host a and on host b: `bothways launch recipe.yaml --nodes 2 --node-rank 0 --main-address a` · "
    "`bothways launch recipe.yaml --nodes 2 --node-rank 1 --main-address a`"
)
def launch(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    stage: OneStage = [],  # noqa: B006
    runs: Runs = Path("runs"),
    restart: Restart = False,
    nodes: Annotated[int, typer.Option(min=1, help="Hosts that run it together.")] = 1,
    node_rank: Annotated[int | None, typer.Option(min=0, help="Number of this host, from 0.", show_default=False)] = None,
    main_address: Annotated[
        str | None, typer.Option(metavar="HOST", help="Node 0, as the others reach it.", show_default=False)
    ] = None,
    main_port: Annotated[int, typer.Option(help="Free TCP and UDP port of node 0; restarts take the next TCP ports.")] = PORT,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on every node.", show_default="all GPUs")] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Ranks on every node without GPUs.", show_default="1")
    ] = None,
    max_restarts: MaxRestarts = 0,
    heartbeat_limit: HeartbeatLimit = HEARTBEAT_LIMIT,
    records: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the ranks' records and logs here.", show_default=False)
    ] = None,
    hosts: Annotated[str | None, typer.Option(metavar="A,B,…", help="Start all nodes from here.", show_default=False)] = None,
    shell: Annotated[str, typer.Option(help="With --hosts: how to get to a host.")] = cluster.SHELL,
    env: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="With --hosts: this variable goes along, as those of NCCL and gloo always do."),
    ] = [],  # noqa: B006
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Only check that the nodes are fit; with --slurm: before each training stage.")
    ] = False,
    as_json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    slurm: cluster.Slurm = False,
    account: cluster.Account = None,
    partition: cluster.Partition = None,
    qos: cluster.Qos = None,
    constraint: cluster.Constraint = None,
    gres: cluster.Gres = None,
    exclude: cluster.Exclude = None,
    time: cluster.Time = None,
    cpus_per_task: cluster.CpusPerTask = None,
    mem: cluster.Mem = None,
    job_name: cluster.JobName = None,
    sbatch: cluster.Sbatch = [],  # noqa: B006
    setup: cluster.Setup = [],  # noqa: B006
    container_image: cluster.ContainerImage = None,
    container_mounts: cluster.ContainerMounts = None,
    max_requeues: cluster.MaxRequeues = MAX_REQUEUES,
    signal_before: cluster.SignalBefore = SIGNAL_BEFORE,
    sweep: cluster.Sweep = [],  # noqa: B006
    test_only: cluster.TestOnly = False,
    wait: cluster.Wait = False,
) -> None:
    """Run a recipe on several hosts; all of them see the recipe, the data and the directory of runs (a shared file system).

    Training stages run on all nodes together, the others on node 0 alone.
    """
    given = dict(locals())
    if slurm:
        with _failing_stage():
            cluster.launch_slurm(given)
        return
    cluster.require_no_slurm_options(given)
    with _failing_stage():
        cluster.launch_nodes(given)


@app.command(
    epilog="Examples: `bothways check recipe.yaml --set teacher.train.batch_size=64` · `bothways check recipe.yaml --show`"
)
def check(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    runs: Runs = Path("runs"),
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe as it will run: overrides applied, inherited values written out.")
    ] = False,
) -> None:
    """Validate a recipe and everything that it names, in under a second."""
    from engine.config import load_recipe
    from launch.check import check_recipe
    from launch.recipe import load_stages

    loaded = load_recipe(recipe, overrides, runs)
    stages = load_stages(loaded)
    notes: list[str] = []
    checked = check_recipe(loaded, stages, say=notes.append)
    if show:
        from launch.show import show_recipe

        print(show_recipe(loaded, stages), end="")
        return
    for note in notes:
        print(f"data: {note}")
    for name, said in checked.items():
        print(f"{name}: {loaded.stages[name][0]}: {said}")


@app.command(
    "resume-check",
    epilog="Examples: `bothways resume-check recipe.yaml` · "
    "`bothways resume-check recipe.yaml --stage base --set base.processes=2`",
)
def check_resume(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer copies it
    stage: Annotated[str | None, typer.Option(help="The stage to try.", show_default="the first that trains")] = None,
    steps: Annotated[int, typer.Option(min=5, help="Optimizer steps of every trial run.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the moments of interruption.")] = 0,
    runs: Runs = Path("runs"),
) -> None:
    """Prove that a stage resumes bit by bit: train it, kill it, stop it, resume it, compare.

    Three short runs of one stage in a scratch directory: undisturbed, killed and resumed, asked to stop and resumed. Exit
    status 1 when weights, losses or metrics differ in a single bit.
    """
    from launch.resume_check import resume_check

    trials = resume_check(recipe, overrides, runs, stage, steps, seed, lambda text: print(text, flush=True))
    different = [trial for trial in trials if trial.difference]
    print(f"verdict: {'resume is NOT exact' if different else 'resume is bit-exact'}")
    if different:
        sys.exit(1)


@app.command(
    epilog="Examples: `bothways plan recipe.yaml` · `bothways plan recipe.yaml --stage base --world-size 64 --gpu-memory 80GB`"
)
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    stage: Annotated[list[str], typer.Option(help="Plan this stage alone; may be repeated.", show_default=False)] = [],  # noqa: B006
    runs: Runs = Path("runs"),
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks, over all nodes.", show_default="what this machine would start")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="80GB", help="Memory of a GPU.", show_default="the GPU here, or this machine's memory")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each training stage needs in memory under every ZeRO level, and which micro batch fits."""
    from launch.planning.plan import print_plan

    print_plan(recipe, overrides, runs, stage, world_size, gpu_memory, as_json)


@app.command(
    epilog='Examples: `bothways predict runs/demo/engine "a fine film"` · `cat texts.txt | bothways predict runs/demo/engine` · '
    "`bothways predict runs/demo/engine --input rows.jsonl --output predictions.jsonl` · "
    "`bothways predict runs/cola/engine --input test.tsv --output CoLA.tsv --fields index,prediction=label` · "
    '`bothways predict runs/qa/engine "Who wrote it?" --with context=@article.txt`'
)
def predict(
    bundle: BundlePath,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="Texts; none: lines of stdin.")] = [],  # noqa: B006
    source: Annotated[Path | None, typer.Option("--input", metavar="FILE", help="Rows: JSON, CSV, text, ….")] = None,
    target: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write JSON lines there.")] = None,
    fields: Annotated[
        str | None,
        typer.Option(metavar="A,B=C", help="Write a table of these, as in index,prediction=label.", show_default=False),
    ] = None,
    expected: Annotated[int | None, typer.Option("--rows", min=1, help="Refuse a file of another number of rows.")] = None,
    layout: LayoutOption = [],  # noqa: B006
    empty: Annotated[bool, typer.Option("--empty", help="Answer rows with an empty text, too.")] = False,
    others: Annotated[
        list[str],
        typer.Option("--with", metavar="INPUT=TEXT", help="Another input of all texts; @FILE reads it.", show_default=False),
    ] = [],  # noqa: B006
    as_json: Json = False,
    engine: Engine = None,
    threads: Threads = None,
) -> None:
    """Answer texts with a bundle."""
    from export.serving.bundle import Bundle
    from launch.predict import find_bundle
    from launch.predict import predict as predict_rows

    opened = Bundle.open(find_bundle(bundle), engine=engine, threads=threads)
    options: dict[str, Any] = {"fields": fields, "expected": expected, "layout": layout, "empty": empty, "others": others}
    predict_rows(opened, texts, source, target, as_json, **options)


@app.command(epilog="Example: `bothways serve runs/demo/engine --http-port 8000 --grpc-port 8001`")
def serve(
    bundle: BundlePath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8001,
    max_queue: Annotated[
        int | None, typer.Option(min=1, help="Requests that may wait.", show_default="as the bundle says")
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Rows of a batch.", show_default="as the bundle says")] = None,
    batch_delay: Annotated[float | None, typer.Option(min=0, help="Milliseconds a batch waits.", show_default="none")] = None,
    engine: Engine = None,
    threads: Threads = None,
) -> None:
    """Serve a bundle: Open Inference Protocol over HTTP and gRPC, a plain text route, health and metrics."""
    from export.serving.server import serve as serve_bundle
    from launch.predict import find_bundle

    path = find_bundle(bundle)
    serve_bundle(path, host, http_port, grpc_port, threads, max_queue, max_batch, batch_delay, engine)


@app.command(epilog="Examples: `bothways verify runs/demo/engine` · `bothways verify runs/demo/engine --sha256 3f8a…`")
def verify(
    bundle: BundlePath,
    identity: Annotated[
        str | None, typer.Option("--sha256", help="The identity that the bundle must have.", show_default=False)
    ] = None,
    engine: Engine = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Check a bundle: hashes of all files, golden outputs, parity with the model that it came from."""
    from export.serving.bundle import verify_bundle
    from launch.predict import find_bundle

    report = verify_bundle(find_bundle(bundle), engine=engine, threads=threads)
    if identity is not None and report["identity"] != identity.lower():
        raise UserError(f"{bundle}: its identity is {report['identity']}, not {identity}: this is another bundle")
    there, here = (", ".join(report["instructions"][place]) or "unknown instructions" for place in ("export", "here"))
    other = f" (exported on a CPU with {there}; this one has {here}: last digits may differ)" if there != here else ""
    print(json.dumps(report, indent=1) if as_json else "\n".join([*_lines(report), f"{bundle}: intact{other}"]))


@app.command(epilog="Examples: `bothways report runs/demo` · `bothways report runs/demo --json`")
def report(run: RunPath, as_json: Json = False) -> None:
    """Draw what each stage made of the model: one offline HTML page, or JSON."""
    from export.report.figures import report_json
    from export.report.page import write_report

    if as_json:
        print(json.dumps(report_json(run), indent=1))
    else:
        print(write_report(run))


@app.command(epilog="Example: `bothways benchmark runs/demo/engine --threads 2`")
def benchmark(
    bundle: BundlePath,
    threads: Threads = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Passes over the golden inputs.", show_default="enough")] = None,
    as_json: Json = False,
) -> None:
    """Measure the latency of a bundle's engine on its own golden inputs."""
    from export.engines.benchmark import benchmark_bundle
    from launch.predict import find_bundle

    options = {"threads": threads, "rounds": rounds}
    result = benchmark_bundle(find_bundle(bundle), **{key: value for key, value in options.items() if value is not None})
    print(json.dumps(result, indent=1) if as_json else "\n".join(_lines(result)))


@app.command(epilog="Examples: `bothways doctor` · `bothways doctor --json`")
def doctor(as_json: Json = False) -> None:
    """Say what this machine can and cannot do, and why."""
    from launch.doctor import examine, show

    findings = examine()
    print(json.dumps([finding._asdict() for finding in findings], indent=1)) if as_json else show(findings)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"bothways {engine.__version__}")
        raise typer.Exit


cli_data.register(app)
cluster.register(app)


def _lines(values: dict[str, Any], where: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        name = f"{where}.{key}".lstrip(".")
        shown = f"{value:.6g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, list) else str(value)
        lines += _lines(value, name) if isinstance(value, dict) else [f"{name}: {shown}"]
    return lines


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `bothways`: a mistake that the user can mend is one line on stderr and exit status 2."""
    usage_error: Any = typer.BadParameter.__bases__[0]  # click's, wherever typer keeps it
    try:
        with printing():
            status = app(arguments or sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.exit(status)
    except UserError as error:
        _fail(str(error), USER_ERROR)
    except usage_error as error:
        context = getattr(error, "ctx", None)
        _fail(f"{error.format_message()} (see `{context.command_path if context else 'bothways'} --help`)", USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except ReaderGone:
        sys.exit(READER_GONE)
    except OSError as error:
        if disk_full(error):
            _fail(f"disk full while writing {error.filename or 'a file'}: free some space and run again", USER_ERROR)
        if error.filename and isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)):
            _fail(f"{error.filename}: {error.strerror}", USER_ERROR)
        raise


if __name__ == "__main__":
    main()
