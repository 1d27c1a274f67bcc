"""What a run survives: killed ranks, full disks, torn files, a killed node, a cut link; and how long the Slurm tests take.

`--only PART` measures one part; figures of other parts that were measured at the same commit are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import RESULTS, ROOT, Figure, figure, head, merge_result
from engine.errors import UserError
from engine.intervals import median_interval

RUNS, CASES, REPEATS, LINK_LIMIT = 50, 20, 3, 10.0
SEED = 0


def _campaign(name: str, make: Callable[[Path, int, int], object], count: int) -> tuple[int, int]:
    from benchmarks.crashes import Campaign, as_dict

    with tempfile.TemporaryDirectory() as scratch:
        campaign = make(Path(scratch), count, SEED)
    assert isinstance(campaign, Campaign)
    (RESULTS / "details").mkdir(parents=True, exist_ok=True)
    path = RESULTS / "details" / f"{name}.json"
    path.write_text(json.dumps({"commit": head(), "seed": SEED, **as_dict(campaign)}, indent=1, ensure_ascii=False) + "\n")
    return campaign.runs, campaign.good


def crashes() -> dict[str, Figure]:
    """Kills ranks at random moments."""
    from benchmarks.crashes import crashes as make

    runs, good = _campaign("crashes", make, RUNS)
    return {"crash_runs": figure(runs, "runs", runs), "crash_runs_bit_equal": figure(good, "runs", runs)}


def disks() -> dict[str, Figure]:
    """Fills the disk at random moments."""
    from benchmarks.crashes import full_disks as make

    cases, good = _campaign("full_disks", make, CASES)
    return {"disk_full_cases_ok": figure(good, "cases", cases)}


def files() -> dict[str, Figure]:
    """Cuts files of checkpoints."""
    from benchmarks.crashes import truncations as make

    cases, good = _campaign("truncated_files", make, CASES)
    return {"truncated_file_cases_ok": figure(good, "cases", cases)}


def nodes() -> dict[str, Figure]:
    """Kills a node, and cuts a link, between two network namespaces."""
    from benchmarks.nodes import cut_link_seconds_over_limit, killed_node_seconds

    killed, cut = killed_node_seconds(REPEATS), cut_link_seconds_over_limit(REPEATS, LINK_LIMIT)
    return {
        "killed_node_seconds": figure(median_interval(killed), "s", len(killed)),
        "cut_link_seconds_over_limit": figure(median_interval(cut), "s", len(cut)),
    }


def slurm() -> dict[str, Figure]:
    """Runs the tests on a real Slurm."""
    started = time.monotonic()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/slurm"], cwd=ROOT).returncode:
        raise UserError("the tests on Slurm fail: their output is above")
    return {"slurm_suite_seconds": figure(time.monotonic() - started, "s")}


PARTS: dict[str, Callable[[], dict[str, Figure]]] = {
    "crashes": crashes,
    "disks": disks,
    "files": files,
    "nodes": nodes,
    "slurm": slurm,
}


def main(argv: list[str]) -> None:
    """Measures, and writes results/faults.json."""
    parser = argparse.ArgumentParser("python -m benchmarks faults", description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; may be repeated")
    chosen = parser.parse_args(argv)
    for name in chosen.only or PARTS:
        print(f"{name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
        print(merge_result("faults", "python -m benchmarks faults", head(), PARTS[name]()))
