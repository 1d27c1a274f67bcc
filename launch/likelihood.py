"""`bothways evaluate` of a pretrained language model: how probable it finds texts, or the better one of pairs.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.answers import Metric
from engine.config import Recipe, Strict
from engine.data.cells import text_cell
from engine.data.sources import PlacedRow, SourceConfig, SourceRows
from engine.errors import UserError, did_you_mean
from engine.intervals import Interval, accuracy_interval, bootstrap_metrics
from engine.judging import LENGTH, compare_groups, groups_of, require_column
from engine.models import positions_of
from engine.models.facts import ModelFiles
from engine.problems import load_section
from launch.progress import progress

if TYPE_CHECKING:
    from engine.likelihood import LanguageModel, Text

MAX_LENGTH = 512
"""Tokens of a row where neither the stage nor the command says otherwise, or the model's positions where they are fewer."""
MOST_GROUPS = 100
"""Values of a column that are judged apart: suites of minimal pairs have many."""
GROUP_RESAMPLES = 500
"""Of the bootstrap of a group."""
FIX = "name the columns: --set text=COLUMN, or --set good=COLUMN --set bad=COLUMN for pairs"


class Columns(Strict):
    """Columns of the data: of texts, or of minimal pairs."""

    text: str | None = None
    """Texts, each scored by itself."""
    good: str | None = None
    """The sentence of a pair that should be the more probable one."""
    bad: str | None = None
    """The other one."""

    def named(self, first: PlacedRow) -> list[str]:
        """Returns the column of texts, or those of the good and the bad sentences, as the first row has them.

        Raises:
            UserError: it lacks one, or both kinds are named.
        """
        if self.text and (self.good or self.bad):
            raise UserError("--set text and --set good/bad: rows hold texts or pairs: name one kind of columns")
        pair = self.good or self.bad or not (self.text or "text" in first or not {"good", "bad"} & set(first))
        columns = [self.good or "good", self.bad or "bad"] if pair else [self.text or "text"]
        for column in columns:
            if column not in first:
                raise UserError(
                    f"{first.path}:{first.line}: no column '{column}' in this row{did_you_mean(column, list(first))}: {FIX}"
                )
        return columns


def evaluate_language_model(
    path: Path,
    section: dict[str, Any],
    data: SourceConfig,
    settings: dict[str, Any],
    max_length: int | None,
    slices: Sequence[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judges a pretrained language model on texts or minimal pairs.

    Args:
        path: its directory.
        section: of the stage that made it, or nothing.
        data: rows.
        settings: `Columns` that have other names.
        max_length: tokens of a row; None: as in pretraining.
        slices: columns by whose values the rows are judged apart, and `length`.

    Returns:
        (the report, as `launch.evaluate.evaluate` has it, with "remarks"; the log-likelihood of every row).

    Raises:
        UserError: rows that cannot be read, that lack a column or hold a text without tokens.
    """
    from engine.likelihood import LanguageModel

    columns = load_section(Columns, settings, "--set").named(next(iter(SourceRows(data, Recipe.here(), {}))))
    source = SourceRows(data, Recipe.here(), dict.fromkeys(columns, text_cell))
    rows: list[PlacedRow] = []
    for row in source:
        for column in slices:
            require_column(row, column, f"{row.path}:{row.line}: ")
        rows.append(row)
    length = max_length or section.get("sequence_length") or min(MAX_LENGTH, positions_of(ModelFiles(path).config) or MAX_LENGTH)
    model = LanguageModel(path, length)
    sides = [_encoded(model, rows, column) for column in columns]
    texts = [text for side in sides for text in side]
    with progress(model.work(texts)) as advance:
        scores_SN = model.log_likelihoods(texts, advance).reshape(len(sides), len(rows))
    figures = _pair_figures(scores_SN) if len(sides) == 2 else _text_figures(model, scores_SN[0], sides[0])
    metric, judged, chosen = figures
    report: dict[str, Any] = {
        "model": str(path),
        "engine": "torch",
        "data": source.describe,
        "rows": len(rows),
        "metrics": {name: interval._asdict() for name, interval in judged(np.arange(len(rows))).items()},
        "metric": metric._asdict(),
        "remarks": _remarks(model, sides, scores_SN, length),
        "slices": {},
    }
    overall = report["metrics"][metric.name]["value"]
    for column in dict.fromkeys(slices):
        by_length = column == LENGTH and not any(LENGTH in row for row in rows)
        cells = [text.tokens for text in sides[0]] if by_length else [row.get(column) for row in rows]
        report["slices"][column] = compare_groups(groups_of(cells, MOST_GROUPS), len(rows), metric, overall, judged, chosen)
    return report, [_record(row, columns, sides, scores_SN[:, at], at) for at, row in enumerate(rows)]


def _encoded(model: LanguageModel, rows: Sequence[PlacedRow], column: str) -> list[Text]:
    texts = model.encode([row[column] for row in rows])
    for row, text in zip(rows, texts, strict=True):
        if not text.tokens:
            raise UserError(
                f"{row.path}:{row.line}: the tokenizer makes no token of column '{column}': fill it, or leave the row out"
            )
    return texts


Figures = tuple[Metric, Callable[[np.ndarray], dict[str, Interval]], Callable[[np.ndarray], Interval]]
"""What rows are compared by; all metrics of some rows; that one alone."""


def _pair_figures(scores_SN: np.ndarray) -> Figures:
    right_N = scores_SN[0] > scores_SN[1]

    def accuracy(rows_N: np.ndarray) -> Interval:
        return accuracy_interval(right_N[rows_N])

    return Metric("accuracy", counted=True), lambda rows_N: {"accuracy": accuracy(rows_N)}, accuracy


def _text_figures(model: LanguageModel, score_N: np.ndarray, texts: Sequence[Text]) -> Figures:
    sizes_N3 = np.array([(text.tokens, text.bytes, text.characters) for text in texts])
    pseudo = "pseudo_" if model.pseudo else ""
    metric = Metric(f"{pseudo}bits_per_byte", higher_is_better=False, unit="bits")

    def judged(rows_N: np.ndarray) -> dict[str, Interval]:
        def figures(chosen_N: np.ndarray) -> dict[str, float]:
            at_N = rows_N[chosen_N]
            per_token, per_byte, per_character = (score_N[at_N].sum() / sizes_N3[at_N].sum(axis=0)).tolist()
            return {
                f"{pseudo}log_likelihood": per_token,
                f"{pseudo}perplexity": math.exp(-per_token),
                f"{pseudo}bits_per_byte": -per_byte / math.log(2),
                f"{pseudo}bits_per_character": -per_character / math.log(2),
            }

        return bootstrap_metrics(figures, len(rows_N), resamples=None if len(rows_N) == len(score_N) else GROUP_RESAMPLES)

    return metric, judged, lambda rows_N: judged(rows_N)[metric.name]


def _remarks(model: LanguageModel, sides: Sequence[Sequence[Text]], scores_SN: np.ndarray, length: int) -> list[str]:
    """Returns what the figures are, and what they leave out, a line each."""
    texts = [text for side in sides for text in side]
    tokens, unknown, cut = (sum(getattr(text, name) for text in texts) for name in ("tokens", "unknown", "truncated"))
    lines = [f"{model.says}; in nats; special tokens stand around every text and are not scored"]
    if len(sides) == 2:
        ties = int((scores_SN[0] == scores_SN[1]).sum())
        lines.append("right: the sum over the tokens of the good sentence is above that of the bad one, not the mean")
        lines += [f"{ties:,} pairs with equal sums count as wrong"] if ties else []
    else:
        lines.append("log-likelihood and perplexity are per token; bits per byte also compare vocabularies; intervals over texts")
    lines.append(f"{unknown:,} of {tokens:,} tokens are unknown")
    lines += (
        [f"{cut:,} of {len(texts):,} texts are truncated to {length:,} tokens: what lies behind is not scored"] if cut else []
    )
    return lines


def _record(row: PlacedRow, columns: list[str], sides: Sequence[Sequence[Text]], scores_S: np.ndarray, at: int) -> dict[str, Any]:
    placed = {"file": str(row.path), "line": row.line}
    found = [
        {"log_likelihood": float(score), "tokens": side[at].tokens, "bytes": side[at].bytes, "truncated": side[at].truncated}
        for score, side in zip(scores_S, sides, strict=True)
    ]
    if len(found) == 1:
        return {**placed, **found[0]}
    return {**placed, "good": found[0], "bad": found[1], "right": bool(scores_S[0] > scores_S[1])}
