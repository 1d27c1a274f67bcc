"""Result files and targets: what was measured, by which command, on which commit and machine, and what it has to reach."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.cpu import instructions
from engine.errors import UserError
from engine.intervals import Interval

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
TARGETS = HERE / "targets.toml"
RESULT_KEYS = {"command", "commit", "machine", "date", "figures"}
FIGURE_KEYS = {"value", "unit", "n", "low", "high"}
Figure = dict[str, Any]


def figure(value: float | Interval, unit: str, n: int = 1) -> Figure:
    """Returns one figure of a result file: {"value", "unit", "n", "low", "high"}; the ends are None without an interval."""
    low, high = (value.low, value.high) if isinstance(value, Interval) else (None, None)
    return {"value": value.value if isinstance(value, Interval) else value, "unit": unit, "n": n, "low": low, "high": high}


@dataclass(frozen=True)
class Target:
    """What an issue asks of a figure; without `op` the figure is only to be measured."""

    unit: str
    issue: int
    op: str | None = None
    value: float | None = None

    def met(self, value: float) -> bool | None:
        """Whether `value` reaches the target, None if there is nothing to reach."""
        if self.op is None or self.value is None:
            return None
        return {"<=": value <= self.value, ">=": value >= self.value, ">": value > self.value}[self.op]

    def __str__(self) -> str:
        return "" if self.op is None else f"{self.op.replace('<=', '≤').replace('>=', '≥')} {number(self.value)}"


def number(value: float | None) -> str:
    """Formats a figure with four significant digits, small ones with two."""
    if value is None:
        return ""
    return f"{value:.2g}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def read_targets(path: Path = TARGETS) -> dict[str, dict[str, Target]]:
    """Returns {benchmark: {figure: target}}."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: {key: Target(**entry) for key, entry in table.items()} for name, table in tables.items()}


def read_results(directory: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Returns {benchmark: result} of every result file.

    Raises:
        UserError: a file that is not in the format of a result.
    """
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            sound = result.keys() == RESULT_KEYS and all(entry.keys() == FIGURE_KEYS for entry in result["figures"].values())
        except (ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(f"{path}: not a result file: make it again with `python -m benchmarks {path.stem}`")
        found[path.stem] = result
    return found


def write_result(name: str, command: str, commit: str, figures: dict[str, Figure], directory: Path = RESULTS) -> Path:
    """Writes `results/NAME.json` and returns its path."""
    path = directory / f"{name}.json"
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    result = {"command": command, "commit": commit, "machine": machine(), "date": date, "figures": figures}
    directory.mkdir(exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def merge_result(name: str, command: str, commit: str, figures: dict[str, Figure], directory: Path = RESULTS) -> Path:
    """Writes figures into `results/NAME.json`, beside those that were measured at the same commit; others are dropped."""
    before = read_results(directory).get(name, {})
    kept = before["figures"] if before.get("commit") == commit else {}
    return write_result(name, command, commit, {**kept, **figures}, directory)


def head() -> str:
    """Returns the commit that is checked out, with `-dirty` when tracked files other than results differ from it."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], cwd=ROOT).returncode
    return commit + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """Returns what a time depends on: processor and its instructions, cores, memory, system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": names[0] if names else platform.processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **({"gpus": cards} if (cards := gpu_names()) else {}),
    }


def gpu_names() -> list[str]:
    """Returns the model of every GPU, as the driver names it."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def rows(
    results: dict[str, dict[str, Any]], targets: dict[str, dict[str, Target]]
) -> Iterator[tuple[str, str, Figure | None, Target | None]]:
    """Yields (benchmark, figure's key, figure or None, target or None): all targets in order, then what has none."""
    for name in [*targets, *(name for name in results if name not in targets)]:
        measured = results.get(name, {}).get("figures", {})
        wanted = targets.get(name, {})
        for key in [*wanted, *(key for key in measured if key not in wanted)]:
            yield name, key, measured.get(key), wanted.get(key)


def verdict(entry: Figure | None, target: Target | None) -> str:
    """Returns `met`, `missed`, `measured` (nothing to reach) or `not measured`."""
    if entry is None:
        return "not measured"
    reached = target.met(entry["value"]) if target else None
    return "measured" if reached is None else "met" if reached else "missed"


def span(entry: Figure) -> str:
    """Formats a figure's 95 % interval, empty if it has none."""
    return "" if entry["low"] is None else f"{number(entry['low'])} to {number(entry['high'])}".replace("-", "−")
