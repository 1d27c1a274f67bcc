"""The report of a run: what each stage made of the model, in one offline HTML page or as JSON for machines.

Everything comes from the files that the stages left: `stage.json`, `history.jsonl`, and the manifest of the bundle.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from engine.errors import UserError
from engine.intervals import Interval, accuracy_interval
from engine.stages.stage import STAGE_FILE, digest, read_stage, sha256

PARTIAL = ".partial"
COMPARISON = ("speedup_vs_torch_fp32", "speedup_vs_onnx_fp32")
DROP = "_drop_points"
"""End of the key of what an engine loses of the task's metric; `accuracy_drop_points`, for example."""
BODY_KEYS = ("model", "student.model", "teacher")
"""Keys by which a stage names the model that it changes; the first that names a stage is its place in the chain."""
NEEDED = {"stage", "kind", "recipe", "section", "seed", "inputs", "versions", "machine", "finished", "files"}


@dataclass
class Run:
    """A run directory as read: the records of its finished stages, every stage after those that it reads."""

    directory: Path
    stages: dict[str, dict[str, Any]]
    unfinished: dict[str, int] = field(default_factory=dict)
    """Last recorded optimizer step of each stage that was begun and has not finished."""

    def upstream(self, name: str) -> dict[str, str]:
        """Returns {key of the section: stage} of the finished stages that `name` reads."""
        inputs = self.stages[name]["inputs"]
        return {key: entry["reference"] for key, entry in inputs.items() if entry["reference"] in self.stages}

    def stale(self, name: str) -> list[str]:
        """Returns the upstream stages that were made again after `name` read them."""
        inputs = self.stages[name]["inputs"]
        return [
            other
            for key, other in self.upstream(name).items()
            if inputs[key].get("sha256") != digest(self.stages[other]["files"])
        ]

    @property
    def final(self) -> dict[str, Any] | None:
        """The record of the last export stage; its directory is the bundle."""
        exports = [record for record in self.stages.values() if record["kind"] == "export"]
        return exports[-1] if exports else None

    def chain(self) -> list[str]:
        """Returns the stages that one model went through, first to last: to the exported one, else the longest chain."""
        chains = [self._chain_to(name) for name in ([self.final["stage"]] if self.final else self.stages)]
        return max(reversed(chains), key=len)

    def _chain_to(self, name: str) -> list[str]:
        found = [name]
        while True:
            upstream = self.upstream(found[0])
            chosen = self.stages[found[0]].get("chosen")
            before = chosen if chosen in self.stages else next((upstream[key] for key in BODY_KEYS if key in upstream), None)
            if before is None:
                return found
            found.insert(0, before)

    def measurements(self) -> dict[str, dict[str, Any]]:
        """Returns {engine name: its latency at batch 1} from all export stages, as they measured it."""
        found: dict[str, dict[str, Any]] = {}
        for record in self.stages.values():
            found.update(record.get("benchmark", {}).get("engines", {}))
        return found

    def latency(self, name: str) -> float | None:
        """Returns the median milliseconds at batch 1 of a stage: as the engine, else in ONNX Runtime, else in PyTorch."""
        own = {key: entry for key, entry in self.measurements().items() if entry["stage"] == name}
        for key in (f"{name}/engine", f"{name}/onnx-fp32", *own):
            if key in own:
                return own[key]["median_ms"]
        return None


def read_run(directory: Path) -> Run:
    """Reads the finished stages of a run directory.

    Raises:
        UserError: no such directory, no finished stage in it, or a stage.json that is none.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory (it is made by `bothways run RECIPE`)")
    if (directory / STAGE_FILE).exists():
        raise UserError(f"{directory}: this is one stage; name the run directory: {directory.parent}")
    records = {}
    for path in sorted(directory.iterdir()):
        # A stage that is running or was interrupted lies in NAME.partial, one that is being replaced in NAME.old.
        record = read_stage(path) if path.is_dir() and "." not in path.name else None
        if record is None:
            continue
        if not isinstance(record, dict) or not NEEDED.issubset(record) or record["stage"] != path.name:
            raise UserError(f"{path / STAGE_FILE}: not the record of stage '{path.name}': remove {path} to run the stage again")
        records[path.name] = record
    if not records:
        raise UserError(f"{directory}: no finished stage in it: run it with `bothways run RECIPE`")
    unfinished = {}
    for path in sorted(directory.glob(f"*{PARTIAL}")):
        history = read_history(path)
        unfinished[path.name.removesuffix(PARTIAL)] = history[-1]["step"] if history else 0
    return Run(directory, _ordered(records), unfinished)


def _ordered(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sorts topologically; among stages that could come next, the one that finished first does."""
    waiting = {
        name: {entry["reference"] for entry in record["inputs"].values()} & records.keys() - {name}
        for name, record in records.items()
    }
    ready = [(records[name]["finished"], name) for name, before in waiting.items() if not before]
    heapq.heapify(ready)
    order: dict[str, dict[str, Any]] = {}
    while ready:
        _, name = heapq.heappop(ready)
        order[name] = records[name]
        for other, before in waiting.items():
            if name in before:
                before.remove(name)
                if not before:
                    heapq.heappush(ready, (records[other]["finished"], other))
    if len(order) < len(records):
        raise UserError(
            f"stages {sorted(records.keys() - order.keys())} read each other: their stage.json files are inconsistent"
        )
    return order


def read_history(stage: Path) -> list[dict[str, Any]]:
    """Returns the records of a stage's history.jsonl, none if it has none; a last line cut off by a kill is left out."""
    try:
        lines = (stage / "history.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{stage / 'history.jsonl'}:{number}: not JSON: the file is damaged") from None
    return found


class Score(NamedTuple):
    """What the metric of a task says of a stage."""

    split: str
    interval: Interval
    """The value alone, thrice, where no interval was kept."""
    name: str
    unit: str
    counted: bool
    higher_is_better: bool

    @property
    def bounded(self) -> bool:
        """There is an interval."""
        return self.interval.low < self.interval.high

    @property
    def shown(self) -> str:
        """The value with its unit."""
        return f"{self.interval.value:.1f} %" if self.unit == "%" else f"{self.interval.value:.3g} {self.unit}".rstrip()


def interval_of(metrics: dict[str, float], metric: dict[str, Any]) -> Interval | None:
    """Returns a split's metric: with Wilson's interval where it is a share of right examples, else with the one that was kept."""
    name = metric["name"]
    value = metrics.get(name)
    if value is None:
        return None
    if not metric["counted"]:
        return Interval(value, metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value))
    examples = int(metrics["examples"])
    return accuracy_interval(np.arange(examples) < round(value / 100 * examples))


def judged(record: dict[str, Any]) -> Score | None:
    """Returns the metric of a fine-tuned model: on the test split, else on the validation split; None where there is none."""
    metrics, metric = record.get("metrics", {}), record.get("metric")
    for split in ("test", "validation"):
        interval = interval_of(metrics.get(split, {}), metric) if metric else None
        if metric and interval:
            return Score(split, interval, metric["name"], metric["unit"], metric["counted"], metric["higher_is_better"])
    return None


def drop_of(comparison: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Returns (key, figure) of what an engine loses against its baseline."""
    return next(((key, figure) for key, figure in comparison.items() if key.endswith(DROP) and figure), None)


def report_json(run_dir: Path | str) -> dict[str, Any]:
    """Returns the run for machines: {"stages": [...], "comparison": {...}}; what was not measured is None.

    Scores are in percent, ratios are ratios. `comparison` holds {"value", "low", "high", "n"} of each figure.

    Raises:
        UserError: as `read_run`.
    """
    run = read_run(Path(run_dir))
    stages = []
    for name, record in run.stages.items():
        metrics = {}
        for split, values in record.get("metrics", {}).items():
            metric = record.get("metric") or {"name": None, "counted": False}
            interval = interval_of(values, metric) if metric["counted"] else None
            ends = {f"{metric['name']}_low": interval.low, f"{metric['name']}_high": interval.high} if interval else {}
            metrics[split] = {**values, **ends}
        stages.append(
            {
                "name": name,
                "kind": record["kind"],
                "metrics": metrics,
                "parameters": record.get("parameters"),
                "weight_bytes": record.get("weight_bytes"),
                "latency_ms_b1": run.latency(name),
            }
        )
    final = run.final or {}
    found = final.get("comparison", {})
    named = [record["metric"]["name"] for record in (final, *run.stages.values()) if record.get("metric")]
    keys = [f"{named[0]}{DROP}", *COMPARISON] if named else COMPARISON
    return {"stages": stages, "comparison": {key: found.get(key) for key in keys}}


def replay_recipe(run: Run) -> str:
    """Returns the recipe that the stages ran with, every default written out, as YAML."""
    records = list(run.stages.values())
    stages = {record["stage"]: {record["kind"]: record["section"]} for record in records}
    recipe = {"name": records[0]["recipe"], "seed": records[-1]["seed"], "stages": stages}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)


def bundle_identity(run: Run) -> dict[str, str] | None:
    """Returns where the bundle lies and the SHA-256 of its manifest, which names every other file's hash."""
    if run.final is None:
        return None
    path = run.directory / run.final["stage"]
    manifest = path / "manifest.json"
    return {"path": str(path), "sha256": sha256(manifest)} if manifest.is_file() else None
