"""Commands that begin with data, or try values: `bothways new`, `bothways evaluate`, `bothways sweep`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

Engine = Annotated[str | None, typer.Option(help="onnxruntime, tensorrt or tensorrt_rtx.", show_default="onnxruntime")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engine.", show_default="one per core")]
LayoutOption = Annotated[
    list[str],
    typer.Option("--layout", metavar="KEY=VALUE", help="How the files are laid out, as in quoting=none.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command(
        epilog="Examples: `bothways new --data reviews.csv` · "
        "`bothways new --data reviews.csv --column text=body --column label=stars --model models/minilm`"
    )(new)
    app.command(
        epilog="Examples: `bothways sweep r.yaml --stage teacher --set train.epochs=2,3 --set train.learning_rate=1e-5,3e-5` · "
        "`bothways sweep r.yaml --stage teacher --set train.learning_rate=1e-5..1e-3 --random 12 --seed 1`"
    )(sweep)
    app.command(
        epilog="Examples: `bothways evaluate runs/demo/engine new.csv` · "
        "`bothways evaluate runs/demo/teacher new.csv --set text=review --set label=stars --output predictions.jsonl` · "
        "`bothways evaluate runs/own/base heldout.jsonl` · "
        "`bothways evaluate runs/own/base pairs.jsonl --set good=right --set bad=wrong --slice kind`"
    )(evaluate)


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)],
    stage: Annotated[str, typer.Option(help="The stage whose keys are varied and whose metric is compared.", show_default=False)],
    values: Annotated[
        list[str],
        typer.Option("--set", metavar="A.B=C,D,…", help="Values of a key of the stage; may be repeated.", show_default=False),
    ] = [],  # noqa: B006
    count: Annotated[
        int | None, typer.Option("--random", min=1, help="So many random points; ranges as in 1e-5..1e-3.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random points.")] = 0,
    points_only: Annotated[bool, typer.Option("--points-only", help="Write the points, for launch --slurm; run none.")] = False,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories lie.")] = Path("runs"),
) -> None:
    """Run a stage with each combination of some values, and compare them in a table; started again, it goes on."""
    from launch.sweep import show
    from launch.sweep import sweep as run_sweep
    from launch.watchdog import StageError

    try:
        rows = run_sweep(recipe, stage, values, runs, count, seed, points_only, lambda text: print(text, flush=True))
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.status) from None
    if rows:
        print(show(rows))
    if any(row["state"] != "finished" for row in rows):
        raise typer.Exit(1)


def new(
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Labelled rows: a file, a pattern or hub:NAME.")],
    task: Annotated[str | None, typer.Option(help="What the model is for.", show_default="seen in the columns")] = None,
    model: Annotated[str | None, typer.Option(help="What to fine-tune.", show_default="a small encoder of the hub")] = None,
    columns: Annotated[
        list[str], typer.Option("--column", metavar="KEY=NAME", help="A column that is not to be guessed.", show_default=False)
    ] = [],  # noqa: B006
    target: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The recipe.", show_default="named after the data")
    ] = None,
) -> None:
    """Write a commented recipe that runs, from a look at the data: format, columns, labels, lengths."""
    from launch.new import new_recipe

    path, seen = new_recipe(data, target, task, model, columns)
    print("\n".join([*seen, f"{path}: written; next: bothways check {path}, then bothways run {path}"]))


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle, a stage's directory or a model directory.")],
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Labelled rows; texts or pairs for a language model: files, patterns or hub:NAME."),
    ],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="A=C", help="A key of the task that differs in this data.", show_default=False)
    ] = [],  # noqa: B006
    target: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the predictions there as JSON lines.")
    ] = None,
    slices: Annotated[
        list[str],
        typer.Option("--slice", metavar="COLUMN", help="Judge each value apart; `length`: by tokens.", show_default=False),
    ] = [],  # noqa: B006
    layout: LayoutOption = [],  # noqa: B006
    max_length: Annotated[int | None, typer.Option(min=4, help="Tokens of a row.", show_default="as in training")] = None,
    engine: Engine = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Judge any saved model or bundle on new data: every metric with its 95 % interval.

    A pretrained language model: perplexity and bits per byte of the column `text`, or how often `good` of a pair beats `bad`.
    """
    from launch.evaluate import evaluate as judge
    from launch.evaluate import table, write_predictions

    report, predictions = judge(model, data, overrides, max_length, engine, threads, slices, layout)
    if target is not None:
        write_predictions(target, predictions)
    print(json.dumps(report, indent=1) if as_json else table(report))
