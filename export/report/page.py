"""The HTML page of a report: figures and plots of a run laid out by `report.html` (Jinja2); no script, nothing from elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.intervals import Interval
from export.report import plots
from export.report.figures import Run, Score, bundle_identity, drop_of, judged, read_history, read_run, replay_recipe
from export.report.insight import insight_of

REPORT_FILE = "report.html"
RAIL_ROW, RAIL_LANE = 70, 13
"""Pixels between two stages in the picture of the chain, and between two of its lines."""
RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}
Figures = list[dict[str, str]]


def write_report(run_dir: Path | str) -> Path:
    """Writes `report.html` into the run directory and returns its path.

    Raises:
        UserError: as `read_run`, or the page cannot be written.
    """
    run = read_run(Path(run_dir))
    return write_page(run.directory / REPORT_FILE, REPORT_FILE, report_values(run))


def write_page(target: Path, template: str, values: dict[str, Any]) -> Path:
    """Writes a page from a template of this directory, complete or not at all, and returns its path.

    Raises:
        UserError: it cannot be written.
    """
    html = _templates().get_template(template).render(**values)
    part = target.with_suffix(".tmp")
    try:
        part.write_text(html, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{target}: the report cannot be written: {error.strerror}") from None
    return target


def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(megabytes=megabytes, count=count, duration=duration, interval=interval)
    return environment


def report_values(run: Run) -> dict[str, Any]:
    """Returns what the page of a run shows."""
    return dict(
        run=run,
        name=next(iter(run.stages.values()))["recipe"],
        headline=headline(run),
        tiles=tiles(run),
        rail=rail(run),
        rows=(rows := [row(run, name) for name in run.stages]),
        scored=next(
            (in_unit(r["score"].name.capitalize(), r["score"].unit, ", ") for r in reversed(rows) if r["score"]), "Score"
        ),
        f1=any("f1_macro" in r["metrics"] for r in rows),
        figures=figures(run),
        insight=insight_of(run),
        curves=training_curves(run),
        engines=engines(run),
        versions=versions(run),
        bundle=bundle_identity(run),
        recipe=replay_recipe(run),
    )


def megabytes(value: float | None) -> str:
    """Formats bytes as MB (10⁶ bytes)."""
    return "–" if value is None else f"{value / 1e6:,.1f} MB"


def in_unit(name: str, unit: str, between: str = " in ") -> str:
    """Returns a figure's name with its unit, where it has one."""
    return f"{name}{between}{unit}" if unit else name


def count(value: float | None) -> str:
    """Formats a number of parameters or examples: 22.7 M, 853."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Formats seconds: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval(value: Interval | dict[str, Any], digits: int = 1) -> str:
    """Formats the ends of an interval: 83.9 to 88.2."""
    low, high = (value.low, value.high) if isinstance(value, Interval) else (value["low"], value["high"])
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")


def headline(run: Run) -> str:
    """Returns the verdict in one sentence."""
    final, comparison = run.final, (run.final or {}).get("comparison") or {}
    score = judged(final) if final else None
    if final is None or score is None:
        return "No engine has been exported yet." if final is None else ""
    does = f"is right on {score.shown}" if score.counted else f"has {_article(score.name)} {score.name} of {score.shown} on"
    text = f"The engine of stage “{final['stage']}” {does} {'of ' if score.counted else ''}the {score.split} rows"
    drop, speed = (drop_of(comparison) or ("", None))[1], comparison.get("speedup_vs_torch_fp32")
    if drop and score.counted:
        side = "below" if drop["value"] >= 0 else "above"
        text += f", {abs(drop['value']):.1f} points {side} “{comparison['baseline']}”"
    if speed:
        text += f", and {speed['value']:.1f} times as fast as “{comparison['baseline']}” in PyTorch fp32"
    return text + "."


def tiles(run: Run) -> Figures:
    """Returns the figures of the header: {"label", "value", "unit", "detail"}."""
    final = run.final
    record = final or run.stages[run.chain()[-1]]
    found: Figures = []

    def tile(label: str, value: str, unit: str, detail: str) -> None:
        found.append({"label": label, "value": value, "unit": unit, "detail": detail})

    score = judged(record)
    if score:
        value, _, unit = score.shown.partition(" ")
        rows = f"{score.split}, n\u00a0=\u00a0{record['metrics'][score.split]['examples']:,.0f}"
        detail = f"{interval(score.interval)} · {rows}" if score.bounded else rows
        tile(f"{score.name.capitalize()} of {record['stage']}", value, unit, detail)
    comparison = record.get("comparison") or {}
    baseline = comparison.get("baseline")
    lost = (drop_of(comparison) or ("", None))[0]
    for key, label, unit in (
        (lost, f"Drop from {baseline}", "points" if score and score.unit == "%" else score.unit if score else ""),
        ("speedup_vs_torch_fp32", f"Over {baseline} in PyTorch fp32", "× faster"),
        ("speedup_vs_onnx_fp32", f"Over {baseline} in ONNX Runtime fp32", "× faster"),
    ):
        figure = comparison.get(key)
        if figure:
            ends = f"{interval(figure)} · " if "low" in figure else ""
            how = "paired bootstrap" if ends else f"n\u00a0=\u00a0{figure['n']:,}"
            detail = ends + (how if key == lost else f"batch\u00a01, {record['benchmark']['threads']}\u00a0threads")
            tile(label, f"{figure['value']:.1f}" if ends else f"{figure['value']:.3g}", unit, detail)
    size = record.get("weight_bytes")
    if size is not None:
        ratio = comparison.get("weight_bytes_ratio")
        detail = f"{ratio:.1%} of {baseline}" if ratio else f"{count(record.get('parameters'))} parameters"
        tile("Weights", f"{size / 1e6:,.1f}", "MB", detail)
    engine = run.measurements().get(f"{record['stage']}/engine")
    if engine:
        tile("Latency at batch 1", f"{engine['median_ms']:.2f}", "ms", f"median; p95 {engine['p95_ms']:.2f} ms")
    return found


def rail(run: Run) -> dict[str, Any]:
    """Returns the picture of who reads whom as SVG paths: an arc diagram, one stage a row; a stage's readers share its arc."""
    index = {name: number for number, name in enumerate(run.stages)}
    readers: dict[str, list[int]] = {name: [] for name in index}
    for name in index:
        for other in set(run.upstream(name).values()):
            readers[other].append(index[name])
    spans = {name: (index[name], max(rows)) for name, rows in readers.items() if any(row > index[name] + 1 for row in rows)}
    lane_of = lanes(spans)
    width = RAIL_LANE * (max(lane_of.values(), default=-1) + 2) + 10
    x, paths = width - 12, []
    for name, rows in readers.items():
        top = _middle(index[name])
        for target in rows:
            bottom = _middle(target)
            if target == index[name] + 1:
                path = f"M{x} {top}V{bottom}"
            else:
                side = x - RAIL_LANE * (lane_of[name] + 1)
                path = f"M{x} {top}Q{side} {top} {side} {top + 24}V{bottom - 24}Q{side} {bottom} {x} {bottom}"
            paths.append({"d": path, "kind": run.stages[name]["kind"]})
    nodes = [{"x": x, "y": _middle(number), "kind": run.stages[name]["kind"]} for name, number in index.items()]
    return {"width": width, "height": RAIL_ROW * len(index), "row": RAIL_ROW, "paths": paths, "nodes": nodes}


def lanes(spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Gives each (first, last) span the innermost lane in which it crosses no other, short spans first."""
    placed: dict[str, int] = {}
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1][1] - item[1][0]):
        taken = {placed[other] for other in placed if spans[other][0] < last and first < spans[other][1]}
        placed[name] = next(lane for lane in range(len(spans)) if lane not in taken)
    return placed


def _middle(number: int) -> int:
    return number * RAIL_ROW + RAIL_ROW // 2


def row(run: Run, name: str) -> dict[str, Any]:
    """Returns what the chain's picture and the table show of one stage."""
    record = run.stages[name]
    score = judged(record)
    return {
        "record": record,
        "score": score,
        "metrics": record.get("metrics", {}).get(score.split if score else "validation", {}),
        "spread": record.get("spread", {}).get(score.split, {}).get(score.name) if score else None,
        "latency": run.latency(name),
        "reads": ", ".join(dict.fromkeys(run.upstream(name).values())),
        "stale": run.stale(name),
        "seconds": record.get("seconds", {}).get("this_run"),
    }


def figures(run: Run) -> Figures:
    """Returns the plots of accuracy, size and latency: {"title", "caption", "svg"}; what was not measured is left out."""
    chain, found = run.chain(), []
    scores = {name: entry for name, record in run.stages.items() if (entry := judged(record))}
    last = next((scores[name] for name in reversed(chain) if name in scores), None)
    on_split = {name: s.interval for name, s in scores.items() if last and (s.split, s.name) == (last.split, last.name)}
    axis = in_unit(last.name, last.unit) if last else ""
    steps = [(name, on_split[name]) for name in chain if name in on_split]
    beside = [(name, value) for name, value in on_split.items() if name not in chain]
    if last and steps:
        caption = f"{_meaning(last)} Bars: change from the stage before{'; whiskers: 95 % intervals' if last.bounded else ''}."
        drawn = plots.waterfall(steps, True, "chain", axis, last.higher_is_better)
        found.append(_figure(f"{last.name.capitalize()} along the chain", caption, drawn))
    sizes = [(name, run.stages[name]["weight_bytes"]) for name in chain if run.stages[name].get("weight_bytes")]
    if sizes:
        caption = "Bytes of the weights on disk; the shadow is what a stage took away."
        found.append(_figure("Size along the chain", caption, plots.size_waterfall(sizes)))
    measured = engines(run)
    if measured:
        times = [(engine["label"], engine["interval"], engine["engine"]) for engine in measured]
        caption = "One row at its own length per call, engines interleaved in one process."
        found.append(_figure("Latency", caption, plots.latency_waterfall(times)))
        points = [
            (_short(engine), engine["interval"], on_split[engine["stage"]], engine["engine"])
            for engine in measured
            if engine["stage"] in on_split
        ]
        if points and last:
            better = "Up" if last.higher_is_better else "Down"
            caption = (
                f"{better} and left is better; ONNX Runtime where nothing else is said. The line joins what nothing else beats "
                f"in both{'; whiskers: intervals' if last.counted else ''}."
            )
            drawn = plots.pareto(points, axis, last.higher_is_better)
            found.append(_figure(f"{last.name.capitalize()} against latency", caption, drawn))
    if last and beside:
        caption = f"Models that are not on the way to the last one, on the {last.split} rows."
        found.append(_figure("Beside the chain", caption, plots.waterfall(beside, False, "beside", axis, last.higher_is_better)))
    return found


def _meaning(score: Score) -> str:
    return f"Share of {score.split} rows that were answered right." if score.counted else f"On the {score.split} rows."


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _short(engine: dict[str, Any]) -> str:
    kind = engine["precision"] if engine["engine"] else "" if engine["runtime"] == "onnxruntime" else "PyTorch"
    return f"{engine['stage']} {kind}".rstrip()


def _figure(title: str, caption: str, svg: str) -> dict[str, str]:
    return {"title": title, "caption": caption, "svg": svg}


def engines(run: Run) -> list[dict[str, Any]]:
    """Returns the latencies in the order of the stages; PyTorch before ONNX Runtime."""
    order = list(run.stages)
    entries = [(key, entry) for key, entry in run.measurements().items() if entry["stage"] in order]
    entries.sort(key=lambda item: (order.index(item[1]["stage"]), item[1]["runtime"] != "torch"))
    return [
        {
            **entry,
            "label": f"{entry['stage']}\n{RUNTIMES.get(entry['runtime'], entry['runtime'])} {entry['precision']}",
            "interval": Interval(entry["median_ms"], entry["low"], entry["high"]),
            "engine": key.endswith("/engine"),
        }
        for key, entry in entries
    ]


def training_curves(run: Run) -> Figures:
    """Returns a plot for each stage that trained."""
    found = []
    for name, record in run.stages.items():
        history = read_history(run.directory / name)
        training = [(line["step"], line["loss"]) for line in history if "loss" in line]
        judgements = [(line["step"], line["validation"]) for line in history if "validation" in line]
        if not training:
            continue
        losses = {"training": training}
        if record["kind"] != "distill":  # its training loss is the distance to the teacher, another quantity
            losses["validation"] = [(step, values["loss"]) for step, values in judgements if "loss" in values]
        metric = record.get("metric") or {"name": "", "unit": ""}
        scores = [(step, values[metric["name"]]) for step, values in judgements if step and metric["name"] in values]
        best = record.get("best_step")
        svg = plots.curves(name, losses, in_unit(metric["name"], metric["unit"]), scores, best)
        facts = [f"{record.get('steps', training[-1][0]):,} steps in {duration(record.get('seconds', {}).get('training'))}"]
        facts += [f"best at step {best:,}"] if best else []
        facts += [str(record["processes"])] if "processes" in record else []
        found.append(_figure(f"{name} · {record['kind']}", "; ".join(facts), svg))
    return found


def versions(run: Run) -> dict[str, str]:
    """Returns {package: version}; where stages ran with different ones, all of them."""
    found: dict[str, dict[str, None]] = {}
    for record in run.stages.values():
        for package, version in record["versions"].items():
            found.setdefault(package, {})[version] = None
    return {package: ", ".join(different) for package, different in sorted(found.items())}
