"""Answers judged: each metric with its interval, again for every group of rows (slices), and what was answered worst.

It knows no task: what a figure, an error or a truth is, the answering half says. Shapes: N rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.answers import Answer, Answers, Metric, Row
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval, bootstrap_metrics
from engine.stages import heartbeat

LENGTH = "length"
"""A slice by the tokens of a row, unless a column is called so."""
SETS = "test set"
"""The slice by the names of several test sets."""
MOST_GROUPS, FEWEST_ROWS = 12, 10
"""Of a slice: at most so many groups, each of at least so many rows; what is rarer is pooled."""
BINS = 4
"""Groups of a column of numbers: quartiles."""
RESAMPLES, EXAMPLES = (200, 500), 100_000
"""Of the bootstrap of a group: about so many examples in all, in a number of resamples between these bounds."""
WORST = 20
"""Errors that are kept with their texts."""
LONGEST = 1000
"""Characters of a text that are kept."""
POINTS = 2000
"""Pairs of true and answered numbers that are kept, evenly over the rows."""


def intervals_of(
    answers: Answers, given: Sequence[Answer], rows: Sequence[Row], resamples: int | None = None
) -> dict[str, Interval]:
    """Returns every metric with its 95 % interval: Wilson's for a share of right rows, else the bootstrap's over rows.

    Args:
        resamples: of the bootstrap; None: as many as the number of rows allows.
    """

    def metrics(chosen_N: np.ndarray) -> dict[str, float]:
        return answers.metrics([given[index] for index in chosen_N], [rows[index] for index in chosen_N])

    found = bootstrap_metrics(metrics, len(rows), resamples=resamples)
    if answers.metric.counted:
        found[answers.metric.name] = accuracy_interval(answers.right(list(given), rows))
    return {name: interval for name, interval in found.items() if name != "examples"}


def quick_intervals(answers: Answers, given: Sequence[Answer], rows: Sequence[Row]) -> dict[str, Interval]:
    """Returns `intervals_of` with fewer resamples: their ends move by some hundredths of the width."""
    return intervals_of(answers, given, rows, min(RESAMPLES[1], max(RESAMPLES[0], EXAMPLES // len(rows))))


def require_column(row: Row, column: str, where: str) -> None:
    """Raises UserError when a row lacks a column by which it is to be sliced.

    Args:
        where: begins the message, as in "rows.csv:7: ".
    """
    if column not in row and column != LENGTH:
        raise UserError(f"{where}no column '{column}' to slice by{did_you_mean(column, [*map(str, row), LENGTH])}")


class Group(NamedTuple):
    """Rows that are judged together."""

    value: str
    """What they have in common, in words."""
    rows_N: np.ndarray
    """Their numbers."""
    pooled: int = 0
    """So many rare values are in it."""


def groups_of(cells: Sequence[Any], most: int = MOST_GROUPS) -> list[Group]:
    """Groups rows by the cells of a column.

    Up to `most` values are a group each, the most frequent first; values that are rarer than those, or that fewer than
    FEWEST_ROWS rows have, are pooled as "others". More numbers than MOST_GROUPS are cut into quartiles.
    """
    numbers_N = _numbers(cells)
    if numbers_N is not None and len(np.unique(numbers_N)) > MOST_GROUPS:
        return _quartiles(numbers_N)
    named_N = np.array([_named(cell) for cell in cells], dtype=np.object_)
    counted = Counter(named_N.tolist()).most_common()
    kept = [value for value, count in counted if count >= FEWEST_ROWS]
    if len(counted) > len(kept) or len(kept) > most:
        kept = kept[: most - 1]
    groups = [Group(value, np.flatnonzero(named_N == value)) for value in kept]
    rare = [value for value, _ in counted if value not in kept]
    if rare:
        groups.append(Group(f"others ({len(rare)} value{'' if len(rare) == 1 else 's'})", _of(named_N, rare), len(rare)))
    return groups


def _of(named_N: np.ndarray, values: list[str]) -> np.ndarray:
    wanted = set(values)
    return np.flatnonzero([value in wanted for value in named_N])


def _named(cell: Any) -> str:
    if isinstance(cell, (list, tuple)):
        return ", ".join(map(str, cell)) or "(none)"
    return "(none)" if cell is None or cell == "" else str(cell)


def _numbers(cells: Sequence[Any]) -> np.ndarray | None:
    """Returns the cells as numbers, None when one of them is none."""
    try:
        found_N = np.array([math.nan if isinstance(cell, bool) else float(cell) for cell in cells])
    except (TypeError, ValueError):
        return None
    return found_N if np.isfinite(found_N).all() else None


def _quartiles(numbers_N: np.ndarray) -> list[Group]:
    edges = np.unique(np.quantile(numbers_N, np.linspace(0, 1, BINS + 1)[1:-1]))
    bin_N = np.searchsorted(edges, numbers_N, side="left")
    groups = []
    for number in np.unique(bin_N):
        rows_N = np.flatnonzero(bin_N == number)
        ends = [f"{value:g}" for value in (numbers_N[rows_N].min(), numbers_N[rows_N].max())]
        groups.append(Group(" to ".join(dict.fromkeys(ends)), rows_N))
    return groups


def judge_slices(
    answers: Answers,
    given: Sequence[Answer],
    rows: Sequence[Row],
    columns: Sequence[str],
    sets: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Judges groups of rows.

    Args:
        columns: a column each, or LENGTH.
        sets: {name of a test set: its rows}, where `rows` are several, one after the other.

    Returns:
        {column: {"groups": [{"value", "rows", "pooled", "metrics": {name: {"value", "low", "high"}}}], "worst"}}. `worst` is
        {"value", "rest": interval} of the group with the worst metric among those whose interval lies apart from the interval of
        all other rows, or None.

    Raises:
        UserError: a row lacks a column.
    """
    found = {}
    if sets:
        ends = np.cumsum(list(sets.values()))
        whole = [Group(name, np.arange(end - count, end)) for (name, count), end in zip(sets.items(), ends, strict=True)]
        found[SETS] = _judge_groups(answers, given, rows, whole)
    for column in dict.fromkeys(columns):
        found[column] = _judge_groups(answers, given, rows, groups_of(_cells(answers, rows, column)))
    return found


def _cells(answers: Answers, rows: Sequence[Row], column: str) -> Sequence[Any]:
    if column == LENGTH and not any(column in row for row in rows):
        return answers.lengths(rows).tolist()
    for row in rows:
        require_column(row, column, "")
    return [row.get(column) for row in rows]


def _judge_groups(answers: Answers, given: Sequence[Answer], rows: Sequence[Row], groups: list[Group]) -> dict[str, Any]:
    def judged(rows_N: np.ndarray) -> dict[str, Interval]:
        heartbeat.beat("finish")
        return quick_intervals(answers, [given[row] for row in rows_N], [rows[row] for row in rows_N])

    def chosen(rows_N: np.ndarray) -> Interval:
        if not answers.metric.counted:
            return judged(rows_N)[answers.metric.name]
        return accuracy_interval(answers.right([given[row] for row in rows_N], [rows[row] for row in rows_N]))

    overall = answers.metrics(list(given), rows)[answers.metric.name]
    return compare_groups(groups, len(rows), answers.metric, overall, judged, chosen)


def compare_groups(
    groups: list[Group],
    rows: int,
    metric: Metric,
    overall: float,
    judged: Callable[[np.ndarray], dict[str, Interval]],
    chosen: Callable[[np.ndarray], Interval],
) -> dict[str, Any]:
    """Returns every group with its metrics, and the one that is worse than the rest, as `judge_slices` has them of a column.

    Args:
        rows: how many there are in all.
        metric: by which they are compared.
        overall: that of all rows.
        judged: returns all metrics of the rows with these numbers.
        chosen: returns `metric` alone.
    """
    sign = 1 if metric.higher_is_better else -1
    found = [(group, judged(group.rows_N)) for group in groups]
    worst = None
    for group, intervals in sorted(found, key=lambda pair: sign * pair[1][metric.name].value):
        own, rest_N = intervals[metric.name], np.setdiff1d(np.arange(rows), group.rows_N)
        if min(len(group.rows_N), len(rest_N)) < FEWEST_ROWS or sign * own.value >= sign * overall:
            continue
        rest = chosen(rest_N)
        if own.high < rest.low if sign > 0 else own.low > rest.high:
            worst = {"value": group.value, "rest": rest._asdict()}
            break
    return {
        "groups": [
            {
                "value": group.value,
                "rows": len(group.rows_N),
                "pooled": group.pooled,
                "metrics": {name: interval._asdict() for name, interval in intervals.items()},
            }
            for group, intervals in found
        ],
        "worst": worst,
    }


def mistakes(answers: Answers, given: list[Answer], rows: Sequence[Row]) -> dict[str, Any]:
    """Returns what shows where answers are wrong.

    Returns:
        {"worst": [{"off", and what `Answers.explained` gives}], worst first, "off_by": what `off` is, "confusion", "points"}; the
        latter as the answering half has them.
    """
    off_N = answers.wrongness(given, rows)
    order = [index for index in np.argsort(-off_N, kind="stable")[:WORST] if off_N[index] > 0]
    step = -(-len(rows) // POINTS)
    points = {name: np.round(pairs_N2[::step], 6).tolist() for name, pairs_N2 in answers.points(given, rows).items()}
    return {
        "worst": [_mistake(answers, given[index], rows[index], float(off_N[index])) for index in order],
        "off_by": answers.off_by,
        "confusion": answers.confusion(given, rows),
        "points": points,
    }


def _mistake(answers: Answers, answer: Answer, row: Row, off: float) -> dict[str, Any]:
    seen = answers.explained(answer, row)
    inputs = {column: _short(text) for column, text in seen["inputs"].items()}
    return {**{key: _short(value) for key, value in seen.items()}, "inputs": inputs, "off": round(off, 6)}


def _short(value: Any) -> Any:
    """Returns a value whose texts have LONGEST characters at most."""
    if isinstance(value, str):
        return value[:LONGEST]
    if not isinstance(value, dict) or "pieces" not in value:
        return value
    ends = np.cumsum([len(piece) for piece, _ in value["pieces"]])
    return {"pieces": [pair for pair, end in zip(value["pieces"], ends, strict=True) if end <= LONGEST]}


def seen_in(
    answers: Answers, given: list[Answer], rows: Sequence[Row], slices: Sequence[str], sets: Mapping[str, int]
) -> dict[str, Any]:
    """Returns {file of a stage: what it holds of one split}: figures of classes, mistakes, slices; those that there are."""
    found = {
        "per_class.json": answers.table(given, rows),
        "mistakes.json": mistakes(answers, given, rows),
        "slices.json": judge_slices(answers, given, rows, slices, sets),
    }
    return {name: seen for name, seen in found.items() if seen}


def ends_of(answers: Answers, given: list[Answer], rows: Sequence[Row]) -> dict[str, float]:
    """Returns {NAME_low, NAME_high} of the task's metric, as it is no share of right rows, whose interval follows from it."""
    metric = answers.metric
    if metric.counted:
        return {}
    interval = quick_intervals(answers, given, rows)[metric.name]
    return {f"{metric.name}_low": interval.low, f"{metric.name}_high": interval.high}


def set_names(sets: Mapping[str, int], rows: int) -> list[dict[str, str]]:
    """Returns {"set": its name} of each of `rows` test rows; nothing of each where there is one set."""
    return [{"set": name} for name, count in sets.items() for _ in range(count)] or [{}] * rows


def judged_sets(
    answers: Answers, given: list[Answer], rows: Sequence[Row], sets: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Returns the metrics of each of several test sets, whose rows follow each other."""
    found, start = {}, 0
    for name, count in sets.items():
        part = slice(start, start + count)
        found[name] = answers.metrics(given[part], rows[part]) | ends_of(answers, given[part], rows[part])
        start += count
    return found
