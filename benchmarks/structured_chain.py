"""Entities with a CRF, intents and slots, questions: each from the teacher to the engine, and the same answers wherever it runs.

Of every stage the score on the test rows, megabytes of weights and milliseconds for one input on ONNX Runtime; then the share of
500 test rows that get the same answer from the exported model in PyTorch and in ONNX Runtime, and from the int8 engine here, in
the embedded server and in a real tritonserver (where `python -m tests.serving.triton_server install` has run).

The sets are not part of this project: see `structured_quality`, whose teachers are taken where they have been trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, figure, head, merge_result
from benchmarks.finetune_quality import MODEL, STAGE, Case, arguments
from benchmarks.structured_quality import HEADS, SETS, run_name
from engine.config import load_recipe
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval

CHAINS: dict[str, dict[str, Any]] = {"wnut17": HEADS["f1_crf"][0], "snips": {}, "squad_cut": {}}
"""{set: what its chain changes in the task of `structured_quality`}."""
EPOCHS = {"wnut17": (10, 5), "snips": (10, 5), "squad_cut": (3, 2)}
"""Of the distillation and of the recovery."""
STUDENT, PRUNED, RECOVERED, INT8, ENGINE, FLOAT = "distilled", "pruned", "recovered", "int8", "engine", "float_engine"
ROWS, ASKED = 500, 25
"""Rows that are asked everywhere, and how many of them in one request."""
Row = dict[str, Any]
Ask = Callable[[list[Row]], list[Any]]


def stages_of(name: str, data: Path) -> tuple[Case, dict[str, Any]]:
    """Returns the set with its CRF or without, and the sections of its chain."""
    case = SETS[name]
    case = case._replace(task={**case.task, **CHAINS[name]})
    first, second = EPOCHS[name]
    train = {"batch_size": case.batch_size, "dropout": 0.0, "learning_rate": 2 * case.learning_rate, "keep": "last"}
    return case, {
        STAGE: {"finetune": case.section(data, MODEL)},
        STUDENT: {"distill": {"teacher": STAGE, "student": {"layers": 4}, "train": {**train, "epochs": first}}},
        PRUNED: {"prune": {"model": STUDENT, "heads": 8, "neurons": 1024}},
        RECOVERED: {"distill": {"teacher": STAGE, "student": {"model": PRUNED}, "train": {**train, "epochs": second}}},
        INT8: {"quantize": {"model": RECOVERED}},
        ENGINE: {"export": {"model": INT8, "baseline": STAGE}},
        FLOAT: {"export": {"model": RECOVERED, "baseline": STAGE}},
    }


def chain(name: str, data: Path, runs: Path) -> tuple[Path, Case, Any]:
    """Runs the chain of a set, less what is finished; returns (run directory, the set, its prepared rows)."""
    from engine.data.rows import prepare_for_model
    from launch.pipeline import run_recipe
    from launch.recipe import load_stages

    case, stages = stages_of(name, data)
    run = run_name(name, CHAINS[name])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{run}.yaml")
        path.write_text(json.dumps({"name": run, "seed": 1, "stages": stages}))
        run_recipe(path, runs=runs)
        exported = next(stage for stage in load_stages(load_recipe(path, runs=runs)) if stage.name == FLOAT)
        return runs / run, case, prepare_for_model(exported.config, exported.recipe, runs / run / RECOVERED)


def table(name: str, case: Case, run: Path) -> dict[str, Figure]:
    """Returns score, MB and ms of every stage of a finished chain, and what int8 costs."""
    records = {stage: json.loads((run / stage / "stage.json").read_text()) for stage in stages_of(name, run)[1]}
    engines = records[ENGINE]["benchmark"]["engines"]
    found = {}
    for stage in (STAGE, STUDENT, RECOVERED, ENGINE):
        test = records[stage]["metrics"]["test"]
        ends = [test[f"{case.metric}_{end}"] for end in ("low", "high") if f"{case.metric}_{end}" in test]
        score = Interval(test[case.metric], *ends) if ends else test[case.metric]
        time = engines[f"{stage}/engine" if stage == ENGINE else f"{stage}/onnx-fp32"]
        found[f"{name}_{stage}_{case.metric}"] = figure(score, "%", int(test["examples"]))
        found[f"{name}_{stage}_mb"] = figure(records[stage]["weight_bytes"] / 1e6, "MB")
        median = Interval(time["median_ms"], time["low"], time["high"])
        found[f"{name}_{stage}_ms"] = figure(median, "ms", records[ENGINE]["benchmark"]["rounds"])
    before, after = (records[stage]["metrics"]["test"] for stage in (RECOVERED, ENGINE))
    found[f"{name}_int8_cost_points"] = figure(before[case.metric] - after[case.metric], "points", int(after["examples"]))
    return found


def decided(answer: Any) -> Any:
    """Returns an answer without its probabilities, whose last digits differ from one runtime to another."""
    if isinstance(answer, dict):
        return {key: decided(value) for key, value in answer.items() if not isinstance(value, float) and key != "n_best"}
    return [decided(value) for value in answer] if isinstance(answer, list) else answer


def inputs_of(answers: Any, rows: Any) -> list[Row]:
    """Returns the inputs of the first ROWS rows as servers take them: words are one text."""
    inputs = [answers.inputs(row) for row in rows[:ROWS]]
    return [{key: " ".join(value) if isinstance(value, list) else value for key, value in row.items()} for row in inputs]


def in_parts(ask: Ask, rows: list[Row]) -> list[Any]:
    """Asks ASKED rows at a time."""
    return [answer for first in range(0, len(rows), ASKED) for answer in ask(rows[first : first + ASKED])]


def places(run: Path, prepared: Any, rows: list[Row]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yields (where, answers there, answers of the same model in the bundle here)."""
    from engine.answers._batches import answer_all
    from engine.evaluate import evaluating, torch_run
    from engine.models import load_model
    from export.serving.bundle import Bundle
    from tests.serving.servers import CLIENTS, inputs, serving
    from tests.serving.triton_server import triton, why_not

    model = load_model(run / RECOVERED, prepared.task.head)
    with evaluating(model):
        torch_answers = answer_all(prepared.task.answers, torch_run(model, prepared.task), rows, ASKED)
    yield "onnxruntime", in_parts(Bundle.open(run / FLOAT).predict, rows), torch_answers
    here = in_parts(Bundle.open(run / ENGINE).predict, rows)
    with serving(run / ENGINE) as server:
        yield "server", in_parts(lambda part: server.json("POST", "/predict", part)[1], rows), here
    if why_not():
        print(f"tritonserver: {why_not()}")
        return
    import numpy as np

    with tempfile.TemporaryDirectory() as work, triton(run / ENGINE / "models", Path(work)) as (address, _):
        client = CLIENTS["http"].InferenceServerClient(address, network_timeout=300.0)

        def ask(part: list[Row]) -> list[Any]:
            columns = {key.upper(): np.array([[row[key].encode()] for row in part], dtype=np.object_) for key in part[0]}
            given = client.infer(run.name, inputs("http", columns)).as_numpy("ANSWER")
            return [json.loads(text) for text in given[:, 0]]

        yield "tritonserver", in_parts(ask, rows), here


def main(argv: list[str]) -> None:
    """Measures, and writes results/structured_chain.json."""
    chosen = arguments("structured_chain", __doc__).parse_args(argv)
    data = chosen.data.resolve()
    for name in chosen.only or list(CHAINS):
        if name not in CHAINS:
            raise UserError(f"no chain '{name}'{did_you_mean(name, list(CHAINS))}")
        run, case, prepared = chain(name, data, chosen.runs)
        found = table(name, case, run)
        rows = inputs_of(prepared.task.answers, prepared.rows["test"])
        for where, there, here in places(run, prepared, rows):
            same = [decided(one) == decided(other) for one, other in zip(there, here, strict=True)]
            found[f"{name}_{where}_same"] = figure(accuracy_interval(same), "%", len(rows))
        command = f"python -m benchmarks structured_chain --data {data.name}"
        print(merge_result("structured_chain", command, head(), found))
