"""Batches of packed rows: documents side by side, as an objective corrupts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.batches import BatchPlan
from engine.data.packing import PackedRows
from engine.objectives import BESIDE
from engine.randomness import generator

if TYPE_CHECKING:
    from engine.data.batches import Batch
    from engine.data.corpus import Corpus
    from engine.evaluate import Ranks
    from engine.objectives import Objective, Piece

PROBE_LOGITS = 64
MULTIPLE = 16
"""The width of a second side is one of this: few shapes, whole vectors."""


class PackedBatches:
    """Batches of packed rows, as a seekable function of (step, rank).

    Args:
        corpus: tokenized documents.
        objective: corrupts the tokens.
        tokenizer: gives the special tokens around every piece.
        length: tokens per row.
        batch_size: rows per optimizer step over all ranks.
        seed: of packing, order and corruption.
    """

    def __init__(self, corpus: Corpus, objective: Objective, tokenizer: Any, length: int, batch_size: int, seed: int) -> None:
        self.corpus, self.objective, self.length, self.seed = corpus, objective, length, seed
        self.pad = tokenizer.pad_token_id
        self.frame = objective.frame(tokenizer)
        around = np.asarray([len(self.frame.before), len(self.frame.after)])
        self.between = [] if self.frame.between is None else [self.frame.between]
        self.windows = corpus.windows(objective.longest(length, int(around.sum()) + len(self.between)))
        # Whether what stands before a text stands before each piece, and what stands behind it behind it.
        self.framed = self.frame.pieces | corpus.borders(self.windows)
        lengths = self.windows[:, 1] - self.windows[:, 0] + self.framed @ around + len(self.between)
        self.packed = PackedRows(objective.row_lengths(lengths), length, seed)
        self.plan = BatchPlan(np.full(len(self.packed), length), batch_size, seed, bucket=False)
        self.steps_per_epoch = self.plan.steps_per_epoch

    @property
    def describe(self) -> str:
        """Size of the data and how full the rows are."""
        return (
            f"{len(self.corpus.ends):,} documents, {self.corpus.ends[-1]:,} tokens, {len(self.windows):,} pieces in "
            f"{len(self.packed):,} rows of {self.length} ({self.packed.fill:.1%} filled), {self.steps_per_epoch:,} steps an epoch"
        )

    def piece(self, number: int) -> Piece:
        """Returns a piece and what stands around it."""
        from engine.objectives import Piece

        first, last = (int(place) for place in self.windows[number])
        ends = zip((self.frame.before, self.frame.after), self.framed[number], strict=True)
        before, after = (list(tokens) if there else [] for tokens, there in ends)
        sentences = self.corpus.sentences_in(first, last) - first
        elsewhere = functools.partial(self.corpus.elsewhere, first)
        return Piece(before, self.corpus.tokens[first:last], after, self.between, sentences, elsewhere)

    def row(self, epoch: int, row: int) -> dict[str, np.ndarray]:
        """Returns position_ids, segments and the columns of the objective of one packed row, each of shape (length,); of a second
        side, as long as it is."""
        parts = [
            self.objective.make(self.piece(piece), generator(self.seed, "mask", epoch, piece))
            for piece in self.packed.row(epoch, row)
        ]
        beside = _joined(parts, self.objective.beside, BESIDE) if self.objective.beside else {}
        return {**self._filled(_joined(parts, self.objective.columns), self.length), **beside}

    def _filled(self, columns: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns columns of a row with what stands where there is no token behind them."""
        nothing = {**self.objective.columns, **self.objective.beside}
        filled = {}
        for name, values in columns.items():
            empty = nothing.get(name, 0)
            filled[name] = np.full(length, self.pad if empty is None else empty, dtype=np.int64)
            filled[name][: len(values)] = values
        return filled

    def collate(self, epoch: int, rows: np.ndarray) -> Batch:
        """Stacks rows into tensors of shape (rows, length), or (rows, tokens of the longest) of a second side, with `count`,
        `tokens` and `ends` (see `ends_of`)."""
        import torch

        columns = [self.row(epoch, int(row)) for row in rows]
        if self.objective.beside:
            widest = -(-max(len(column[f"{BESIDE}segments"]) for column in columns) // MULTIPLE) * MULTIPLE
            second = [name for name in columns[0] if name in self.objective.beside or name.startswith(BESIDE)]
            columns = [{**column, **self._filled({name: column[name] for name in second}, widest)} for column in columns]
        arrays = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
        found = {**self.objective.placed(arrays), "ends": ends_of(arrays["segments"])}
        batch: Batch = {name: torch.from_numpy(array) for name, array in (arrays | found).items()}
        batch["count"] = self.objective.count(arrays)
        batch["tokens"] = sum(int((arrays[name] > 0).sum()) for name in ("segments", f"{BESIDE}segments") if name in arrays)
        return batch

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`."""
        epoch, _ = self.plan.position(step)
        return [self.collate(epoch, rows) for rows in self.plan.micro_batches(step, rank, processes, micro)]

    def evaluate(self, model: Any, ranks: Ranks) -> dict[str, float]:
        """Returns loss (nats per predicted token), perplexity and predicted tokens over all rows, always corrupted alike, and
        what else the objective measures."""
        import torch

        rows = np.arange(len(self.packed))
        parts = np.array_split(rows, max(1, -(-len(rows) // 32)))
        training = model.training
        model.eval()
        sums: dict[str, list[float]] = {}
        with torch.no_grad(), ranks.autocast():
            for turn in range(-(-len(parts) // ranks.processes)):
                ranks.poll()
                index = turn * ranks.processes + ranks.rank
                batch = self._on(model, self.collate(0, parts[min(index, len(parts) - 1)]))
                for name, found in self.objective.measure(model, batch).items():
                    before = sums.setdefault(name, [0.0, 0.0])
                    if index < len(parts):
                        sums[name] = [before[0] + float(found[0]), before[1] + float(found[1])]
        model.train(training)
        sums = {name: ranks.sum(*pair) for name, pair in sums.items()}
        means = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        perplexity = math.exp(min(means.get("masked_loss", means["loss"]), 50.0))
        return {**means, "perplexity": perplexity, "predicted_tokens": sums["loss"][1]}

    def probe(self, model: Any) -> list[float]:
        """Returns a few logits of the first row: what saved weights have to give again when they are re-opened."""
        import torch

        training = model.training
        model.eval()
        with torch.no_grad():
            logits = self.objective.logits(model, self._on(model, self.collate(0, np.arange(1))))
        model.train(training)
        return [float(value) for value in logits.flatten()[:PROBE_LOGITS]]

    def _on(self, model: Any, batch: Batch) -> Batch:
        import torch

        return {name: value.to(model.device) for name, value in batch.items() if torch.is_tensor(value)}


def ends_of(segments_BL: np.ndarray) -> np.ndarray:
    """Returns 0, then where each document of packed rows ends in the flattened rows, padding as one of its own, int32."""
    begins_BL = np.diff(segments_BL, axis=1, prepend=-1) != 0
    return np.append(np.flatnonzero(begins_BL), segments_BL.size).astype(np.int32)


def _joined(parts: list[dict[str, np.ndarray]], names: Iterable[str], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the columns of one side of a row, pieces behind one another, and their position_ids and segments."""
    first, *others = names
    lengths = [len(part[first]) for part in parts]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in (first, *others)}
    columns[f"{prefix}position_ids"] = np.concatenate([np.arange(length) for length in lengths])
    columns[f"{prefix}segments"] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    return columns
