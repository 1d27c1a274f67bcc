"""Selection: of several fine-tuned models of one task the best on the validation rows is handed on, with mean and spread of all.

It is the last step of a stage with `seeds`, and can be written by itself: the models may differ in anything but their task.
"""

from __future__ import annotations

import shutil
import statistics
import time
from typing import Any

from pydantic import Field, model_validator

from engine.config import ModelRef, Strict
from engine.data.splits import DataConfig
from engine.errors import UserError
from engine.stages.stage import STAGE_FILE, Stage, read_stage, stage_main
from engine.tasks import AnyTask


class SelectConfig(Strict):
    """Section of a `select` stage."""

    models: list[ModelRef] = Field(min_length=2)
    """Stages of this recipe, or directories of earlier ones, judged by the same metric on the same validation rows."""
    task: AnyTask
    data: DataConfig
    max_length: int = Field(128, ge=4)
    """Those of the models: they are inherited, and passed on."""

    @property
    def model(self) -> ModelRef:
        """The first of them, which stands for all that they have in common."""
        return self.models[0]

    @model_validator(mode="after")
    def _each_once(self) -> SelectConfig:
        if len(set(self.models)) < len(self.models):
            raise ValueError("models names one of them twice")
        return self


def best_of(records: dict[str, dict[str, Any]]) -> str:
    """Returns the model with the best validation metric, the first of equals.

    Args:
        records: {model: its stage.json}.

    Raises:
        UserError: they were chosen by different metrics, or one was never validated.
    """
    metrics = {model: record.get("metric") for model, record in records.items()}
    first = next(iter(metrics))
    for model, metric in metrics.items():
        if metric is None or metric != metrics[first]:
            raise UserError(f"models: '{model}' is judged by {_named(metric)}, '{first}' by {_named(metrics[first])}")
        if "validation" not in records[model]["metrics"]:
            raise UserError(f"models: '{model}' has not been judged on validation rows")
    metric = metrics[first]
    assert metric is not None
    values = {model: record["metrics"]["validation"][metric["name"]] for model, record in records.items()}
    return max(values, key=lambda model: values[model] if metric["higher_is_better"] else -values[model])


def _named(metric: dict[str, Any] | None) -> str:
    return metric["name"] if metric else "nothing"


def spread(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns {split: {metric: {"mean", "sd"}}} over the models; sd with n - 1."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    metrics = [record["metrics"] for record in records.values()]
    for split in metrics[0]:
        names = [
            name for name in metrics[0][split] if name != "examples" and all(name in each.get(split, {}) for each in metrics)
        ]
        values = {name: [each[split][name] for each in metrics] for name in names}
        found[split] = {name: {"mean": statistics.fmean(v), "sd": statistics.stdev(v)} for name, v in values.items()}
    return found


def run(stage: Stage[SelectConfig]) -> None:
    """Runs one selection."""
    started = time.monotonic()
    stage.inputs  # noqa: B018 - missing inputs show first
    records, directories = {}, {}
    for reference in stage.config.models:
        directories[str(reference)] = directory = stage.recipe.find_model(reference)
        record = None if isinstance(directory, str) else read_stage(directory)
        if record is None:
            raise UserError(f"models: '{reference}' has no stage.json that says how good it is")
        records[str(reference)] = record
    chosen = best_of(records)
    record = records[chosen]
    stage.begin()
    shutil.copytree(directories[chosen], stage.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STAGE_FILE))
    found = spread(records)
    _say(chosen, record, found, len(records))
    stage.complete(
        chosen=chosen,
        metric=record["metric"],
        metrics=record["metrics"],
        models={model: {"seed": each.get("seed"), "metrics": each["metrics"]} for model, each in records.items()},
        spread=found,
        parameters=record["parameters"],
        weight_bytes=record["weight_bytes"],
        seconds={"this_run": round(time.monotonic() - started, 3)},
    )


def _say(chosen: str, record: dict[str, Any], found: dict[str, Any], models: int) -> None:
    name, unit = record["metric"]["name"], record["metric"]["unit"]
    for split, values in found.items():
        mean, sd = values[name]["mean"], values[name]["sd"]
        print(f"  {split} {name} of {models} models: {mean:.2f} ± {sd:.2f} {unit}".rstrip(), flush=True)
    print(f"  '{chosen}' is handed on: best on the validation rows", flush=True)


def main() -> None:
    """Entry point of `python -m engine.select RECIPE --stage NAME`."""
    stage_main("engine.select", SelectConfig, run)


if __name__ == "__main__":
    main()
