"""Plots of a run as inline SVG that takes its colours and font from the page around it: readable on screen, phone and paper."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from engine.intervals import Interval

# Matplotlib writes these colours into the SVG, where each becomes a CSS variable of the page (light, dark, print).
INK, MUTED, LINE, ACCENT, SECOND, GAIN, LOSS, PAPER = (f"#01010{digit}" for digit in range(1, 9))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    ACCENT: "accent",
    SECOND: "second",
    GAIN: "gain",
    LOSS: "loss",
    PAPER: "card",
}
WIDE, NARROW = 3.9, 3.3
"""Widths in inches: two and three plots beside each other on a screen, one below the other on a phone."""
ROW = 0.34
"""Height of one horizontal bar in inches."""


def _draw(name: str, label: str, width: float, height: float, paint: Callable[[Any], None]) -> str:
    """Returns an `<svg>` element of `paint(figure)`.

    Args:
        name: keeps the element ids of different plots of a page apart.
        label: what the plot shows, for screen readers.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.titlesize": 8,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures text
        figure.patch.set_alpha(0)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box, "matplotlib writes a viewBox"
    svg = re.sub(r"<svg[^>]*>", f'<svg role="img" {box.group()}><title>{html.escape(label)}</title>', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PathCollection)[^"]*"', "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _rows(axes: Any, names: Sequence[str]) -> None:
    """One row per name, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.spines["left"].set_visible(False)


def _whisker(axes: Any, row: float, interval: Interval, colour: str) -> None:
    axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=1, solid_capstyle="butt")
    for end in (interval.low, interval.high):
        axes.plot([end, end], [row - 0.12, row + 0.12], color=colour, linewidth=1)


def _beside(axes: Any, x: float, row: int, text: str) -> None:
    axes.annotate(text, (x, row), (6, 0), textcoords="offset points", va="center", fontsize=7.5)


def _signed(change: float) -> str:
    return f"{change:+.1f}".replace("-", "−")


def waterfall(steps: Sequence[tuple[str, Interval]], chain: bool, name: str, axis: str, higher_is_better: bool) -> str:
    """The metric of each stage with its interval; with `chain`, a bar from one stage to the next shows gain and loss."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        _rows(axes, [step for step, _ in steps])
        right = max(interval.high for _, interval in steps)
        for row, (_, interval) in enumerate(steps):
            if chain and row:
                before = steps[row - 1][1].value
                gained = interval.value >= before if higher_is_better else interval.value <= before
                axes.barh(row, interval.value - before, left=before, height=0.62, color=GAIN if gained else LOSS, alpha=0.35)
                axes.plot([before, before], [row - 1, row + 0.31], color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
            _whisker(axes, row, interval, MUTED)
            axes.plot(interval.value, row, "o", color=ACCENT, markersize=5, markeredgecolor=PAPER, markeredgewidth=0.8)
            change = f" ({_signed(interval.value - steps[row - 1][1].value)})" if chain and row else ""
            _beside(axes, right, row, f"{interval.value:.1f}{change}")
        intervals = any(interval.low < interval.high for _, interval in steps)
        axes.set_xlabel(f"{axis}, 95 % interval" if intervals else axis)

    return _draw(name, f"{axis} of each stage", WIDE, 0.6 + ROW * len(steps), paint)


def size_waterfall(steps: Sequence[tuple[str, float]]) -> str:
    """Bytes of weights of each stage; what a stage took away stays as a shadow."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        _rows(axes, [step for step, _ in steps])
        for row, (_, size) in enumerate(steps):
            before = steps[max(row - 1, 0)][1]
            if before > size:
                axes.barh(row, (before - size) / 1e6, left=size / 1e6, height=0.62, color=GAIN, alpha=0.2)
            axes.barh(row, size / 1e6, height=0.62, color=ACCENT)
            end = max(size, before) / 1e6
            share = f" (÷ {steps[0][1] / size:.1f})" if row else ""
            _beside(axes, end, row, f"{size / 1e6:.1f}{share}")
        axes.set_xlim(0, max(size for _, size in steps) / 1e6 * 1.12)
        axes.set_xlabel("weights in MB")

    return _draw("size", "Bytes of weights of each stage", WIDE, 0.6 + ROW * len(steps), paint)


def latency_waterfall(steps: Sequence[tuple[str, Interval, bool]]) -> str:
    """Median milliseconds of each (label, interval, is an engine), with the speed-up over the first."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        _rows(axes, [step for step, _, _ in steps])
        first = steps[0][1].value
        for row, (_, interval, engine) in enumerate(steps):
            axes.barh(row, interval.value, height=0.62, color=ACCENT if engine else SECOND)
            _whisker(axes, row, interval, INK)
            speed = f" ({first / interval.value:.1f}×)" if row else ""
            _beside(axes, interval.high, row, f"{interval.value:.2f}{speed}")
        axes.set_xlim(0, max(interval.high for _, interval, _ in steps) * 1.12)
        axes.set_xlabel("median ms at batch 1, 95 % interval")

    return _draw("latency", "Latency of each engine", WIDE, 0.6 + ROW * len(steps), paint)


def on_frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Says of each (cost, value) whether no other point costs no more and is worth no less, and is better in one of them."""
    return [not any((c <= cost and v >= value) and (c < cost or v > value) for c, v in points) for cost, value in points]


def pareto(points: Sequence[tuple[str, Interval, Interval, bool]], axis: str, higher_is_better: bool) -> str:
    """The metric over latency of each (label, milliseconds, metric, is an engine), with the line that nothing else beats."""
    sign = 1 if higher_is_better else -1

    def paint(figure: Any) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes = figure.subplots()
        axes.grid()
        best = on_frontier([(time.value, sign * accuracy.value) for _, time, accuracy, _ in points])
        line = sorted((p[1].value, p[2].value) for p, kept in zip(points, best, strict=True) if kept)
        axes.step(*zip(*line, strict=True), where="post", color=ACCENT, linewidth=1, alpha=0.6)
        for (_, time, accuracy, engine), kept in zip(points, best, strict=True):
            axes.plot([time.value] * 2, [accuracy.low, accuracy.high], color=MUTED, linewidth=0.8, alpha=0.55, zorder=1.5)
            style = {"color": ACCENT if engine else SECOND, "markeredgecolor": PAPER, "markersize": 7 if engine else 5.5}
            axes.plot(time.value, accuracy.value, "D" if engine else "o", **style, alpha=1 if kept else 0.75, zorder=3)
        axes.set_xscale("log")
        axes.margins(x=0.18, y=0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("median ms at batch 1 (logarithmic): left is faster")
        axes.set_ylabel(axis)
        _place_labels(figure, axes, [(label, time.value, accuracy.value) for label, time, accuracy, _ in points])

    return _draw("pareto", f"{axis} over latency", WIDE, 3.0, paint)


def _place_labels(figure: Any, axes: Any, labels: Sequence[tuple[str, float, float]]) -> None:
    """Writes each label beside its point, at the first place where it covers neither a label nor a point."""
    from matplotlib.transforms import Bbox

    places = [(7, 5, "left"), (7, -11, "left"), (-7, 5, "right"), (-7, -11, "right"), (0, 13, "center"), (0, -20, "center")]
    figure.canvas.draw()
    at = axes.transData.transform([(x, y) for _, x, y in labels])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in at]
    for label, x, y in labels:
        for last, (dx, dy, side) in enumerate(places, 1):
            text = axes.annotate(label, (x, y), (dx, dy), textcoords="offset points", ha=side, fontsize=7.5, zorder=4)
            box = text.get_window_extent(figure.canvas.get_renderer())
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if last == len(places) or (inside and not any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            text.remove()


def curves(
    name: str,
    losses: dict[str, list[tuple[int, float]]],
    metric: str,
    values: list[tuple[int, float]],
    best_step: int | None,
) -> str:
    """Losses over optimizer steps and, below, the validation metric.

    Args:
        losses: {"training" | "validation": [(step, loss)]}.
        metric: what `values` are; no second panel when there are none.
        best_step: marked with a line.
    """

    def paint(figure: Any) -> None:
        panels = figure.subplots(2 if values else 1, sharex=True, squeeze=False, height_ratios=[3, 2] if values else None)[:, 0]
        for axes in panels:
            axes.grid()
            if best_step:
                axes.axvline(best_step, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        for kind, points in losses.items():
            if points:
                validation = kind == "validation"
                colour, marker = (ACCENT, "o") if validation else (SECOND, None)
                panels[0].plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.2, label=kind)
        panels[0].set_ylabel("loss")
        panels[0].legend(loc="upper right")
        if values:
            panels[1].plot(*zip(*values, strict=True), color=ACCENT, marker="o", markersize=3, linewidth=1.2)
            panels[1].set_ylabel(metric)
        panels[-1].set_xlabel("optimizer step")

    return _draw(f"curves {name}", f"Training of {name}", NARROW, 2.9 if values else 2.2, paint)


def dots(name: str, axis: str, groups: Sequence[tuple[str, Interval, int, bool]]) -> str:
    """A value with its interval for each (label, interval, rows, is marked); 0 rows are not written."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        _rows(axes, [_short(label) for label, *_ in groups])
        right = max(interval.high for _, interval, _, _ in groups)
        for row, (_, interval, rows, marked) in enumerate(groups):
            colour = LOSS if marked else ACCENT
            _whisker(axes, row, interval, colour if marked else MUTED)
            axes.plot(interval.value, row, "D" if marked else "o", color=colour, markersize=5, markeredgecolor=PAPER)
            _beside(axes, right, row, f"{interval.value:.4g}" + (f" (n = {rows:,})" if rows else ""))
        axes.set_xlabel(f"{axis}, 95 % interval")

    return _draw(name, f"{axis} of each group", WIDE, 0.6 + ROW * len(groups), paint)


def counted(name: str, axis: str, bars: Sequence[tuple[str, int]]) -> str:
    """A bar for each (label, number)."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        _rows(axes, [_short(label, 44) for label, _ in bars])
        for row, (_, number) in enumerate(bars):
            axes.barh(row, number, height=0.62, color=SECOND)
            _beside(axes, number, row, f"{number:,}")
        axes.set_xlabel(axis)

    return _draw(name, f"{axis} of each", WIDE, 0.6 + ROW * len(bars), paint)


def confusion(labels: Sequence[str], counts: Sequence[tuple[int, int, int]]) -> str:
    """The confusion matrix of (true, given, rows): its numbers over shades of the share of the true class."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        totals = [sum(rows for true, _, rows in counts if true == label) for label in range(len(labels))]
        for true, given, rows in counts:
            share = rows / totals[true]
            place = (given - 0.5, true - 0.5)
            colour = ACCENT if true == given else LOSS
            axes.add_patch(_rectangle(place, colour, 0.12 + 0.5 * share))
            axes.text(given, true, f"{rows:,}", ha="center", va="center", fontsize=7.5 if len(labels) <= 12 else 5)
        names = [_short(label, 18) for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=0 if len(labels) <= 4 else 90)
        axes.set_yticks(range(len(labels)), names)
        axes.set_xlim(-0.5, len(labels) - 0.5)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel("answered")
        axes.set_ylabel("true")

    return _draw("confusion", "Confusion matrix", WIDE, 1.2 + 0.3 * max(4, len(labels)), paint)


def _rectangle(place: tuple[float, float], colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(place, 1, 1, facecolor=colour, alpha=alpha, edgecolor="none")


def scatter(name: str, pairs: Sequence[Sequence[float]]) -> str:
    """Answered over true numbers, with the line on which both are equal."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid()
        ends = [min(map(min, pairs)), max(map(max, pairs))]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.plot(*zip(*pairs, strict=True), "o", color=ACCENT, markersize=2.5, alpha=0.4, markeredgewidth=0)
        axes.set_xlabel("true")
        axes.set_ylabel("answered")

    return _draw(name, "Answered over true numbers", WIDE, 3.0, paint)


def _short(label: str, characters: int = 28) -> str:
    return label if len(label) <= characters else label[: characters - 1] + "…"
