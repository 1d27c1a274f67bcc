"""Batches of packed rows: documents side by side, as an objective corrupts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.order import PERIOD, WINDOW, RowOrder
from engine.data.packing import PackedRows
from engine.objectives import BESIDE
from engine.randomness import generator

if TYPE_CHECKING:
    from engine.data.batches import Batch
    from engine.data.corpus import Corpus
    from engine.evaluate import Ranks
    from engine.objectives import Frame, Objective, Piece

EVALUATED = 32
"""Rows of a forward pass without gradients."""
PROBE_LOGITS = 64
MULTIPLE = 16
"""The width of a second side is one of this: few shapes, whole vectors."""


class PackedShard:
    """The packed rows of one shard.

    Args:
        corpus: its documents.
        objective: says how long a piece may be.
        frame: what stands around a text.
        length: tokens per row.
        seed: of the packing.
    """

    def __init__(self, corpus: Corpus, objective: Objective, frame: Frame, length: int, seed: int) -> None:
        around = np.asarray([len(frame.before), len(frame.after)])
        self.corpus, self.frame = corpus, frame
        self.between = [] if frame.between is None else [frame.between]
        self.windows = corpus.windows(objective.longest(length, int(around.sum()) + len(self.between)))
        # Whether what stands before a text stands before each piece, and what stands behind it behind it.
        self.framed = frame.pieces | corpus.borders(self.windows)
        lengths = self.windows[:, 1] - self.windows[:, 0] + self.framed @ around + len(self.between)
        self.packed = PackedRows(objective.row_lengths(lengths), length, seed)
        self.windows = self.windows.astype(np.min_scalar_type(len(corpus.tokens)))

    @property
    def counts(self) -> list[int]:
        """Its rows, pieces, and places in the rows that are filled."""
        return [len(self.packed), len(self.windows), self.packed.tokens]

    def piece(self, number: int) -> Piece:
        """Returns a piece and what stands around it."""
        from engine.objectives import Piece

        first, last = (int(place) for place in self.windows[number])
        ends = zip((self.frame.before, self.frame.after), self.framed[number], strict=True)
        before, after = (list(tokens) if there else [] for tokens, there in ends)
        sentences = self.corpus.sentences_in(first, last) - first
        elsewhere = functools.partial(self.corpus.elsewhere, first)
        return Piece(before, self.corpus.tokens[first:last], after, self.between, sentences, elsewhere)


class PackedBatches:
    """Batches of packed rows, as a seekable function of (step, rank).

    Documents are packed shard by shard: the memory of a rank is that of the few shards whose rows it reads.

    Args:
        sources: {name: shards of tokenized documents}; several are mixed.
        objective: corrupts the tokens.
        tokenizer: gives the special tokens around every piece.
        length: tokens per row.
        batch_size: rows per optimizer step over all ranks.
        seed: of packing, order and corruption.
        weights: share of the rows that each source gives, in any unit; or the power of its number of rows that is.
        languages: {name of a source: the token that its objective tags it with, where it does}.
        ranks: those who share the work.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Corpus]],
        objective: Objective,
        tokenizer: Any,
        length: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | float = 1.0,
        ranks: Ranks | None = None,
        languages: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.objective, self.length, self.seed = objective, length, seed
        self.pad = tokenizer.pad_token_id
        self.frames = {name: objective.frame(tokenizer, languages.get(name)) for name in sources}
        self.sources = sources
        self._shard = functools.lru_cache(maxsize=2 * WINDOW * len(sources))(self._opened)
        self._places = [(name, number) for name, shards in sources.items() for number in range(len(shards))]
        counts = np.zeros((len(self._places), 3))
        for number in range(ranks.rank if ranks else 0, len(counts), ranks.processes if ranks else 1):
            counts[number] = self._shard(number).counts
        if ranks is not None:
            counts = np.reshape(ranks.sum(*counts.flatten()), counts.shape)
        self.ends, self.pieces, self.tokens = np.cumsum(counts.astype(np.int64), axis=0).T
        """Rows, pieces and filled places up to the end of each shard."""
        sizes = np.split(counts[:, 0].astype(np.int64), np.cumsum([len(shards) for shards in sources.values()])[:-1])
        if isinstance(weights, float):
            weights = [float(rows.sum()) ** weights for rows in sizes]
        self.order = RowOrder(sizes, weights, batch_size, seed)
        self.steps_per_epoch = self.order.steps_per_epoch

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.ends[-1])

    @property
    def describe(self) -> str:
        """Size of the data and how full the rows are."""
        fill, shards = self.tokens[-1] / (self.rows * self.length), len(self.ends)
        return (
            f"{self.pieces[-1]:,} pieces in {self.rows:,} rows of {self.length} ({fill:.1%} filled)"
            f"{f' of {shards:,} shards' if shards > 1 else ''}, {self.steps_per_epoch:,} steps an epoch"
        )

    @property
    def shares(self) -> list[str]:
        """Says how several sources are mixed, a line each."""
        if len(self.sources) == 1:
            return []
        parts = zip(self.sources, self.order.streams, self.order.quotas / PERIOD, strict=True)
        return [
            f"{name}: {share:.2%} of the rows, each {share * self.order.total / stream.total:.2f} times an epoch"
            for name, stream, share in parts
        ]

    def _opened(self, number: int) -> PackedShard:
        source, shard = self._places[number]
        return PackedShard(self.sources[source][shard], self.objective, self.frames[source], self.length, self.seed)

    def row(self, epoch: int, row: int) -> dict[str, np.ndarray]:
        """Returns position_ids, segments and the columns of the objective of one packed row, each of shape (length,); of a second
        side, as long as it is."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        shard, within = self._shard(number), row - (int(self.ends[number - 1]) if number else 0)
        parts = [
            self.objective.make(shard.piece(piece), generator(self.seed, "mask", epoch, number, piece))
            for piece in shard.packed.row(epoch, within)
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

    def collate(self, epochs: int | np.ndarray, rows: np.ndarray) -> Batch:
        """Stacks rows, as they are in these epochs, into tensors of shape (rows, length), or (rows, tokens of the longest) of a
        second side, with `count`, `tokens` and `ends` (see `ends_of`)."""
        import torch

        columns = [self.row(int(epoch), int(row)) for epoch, row in zip(np.broadcast_to(epochs, len(rows)), rows, strict=True)]
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
        return [self.collate(*places) for places in self.order.micro_batches(step, rank, processes, micro)]

    def evaluate(self, model: Any, ranks: Ranks) -> dict[str, float]:
        """Returns loss (nats per predicted token), perplexity and predicted tokens over all rows, always corrupted alike, what
        else the objective measures, and the loss of each of several sources."""
        import torch

        parts = [
            (name, rows)
            for name, stream in zip(self.sources, self.order.streams, strict=True)
            for rows in np.array_split(stream.first + np.arange(stream.total), -(-stream.total // EVALUATED))
        ]
        training = model.training
        model.eval()
        several = len(self.sources) > 1
        sums = {name: [0.0, 0.0] for name in ("loss", *(f"loss_{source}" for source in self.sources)) if several}
        with torch.no_grad(), ranks.autocast():
            for turn in range(-(-len(parts) // ranks.processes)):
                ranks.poll()
                index = turn * ranks.processes + ranks.rank
                source, rows = parts[min(index, len(parts) - 1)]
                found = self.objective.measure(model, self._on(model, self.collate(0, rows)))
                found |= {f"loss_{source}": found["loss"]} if several else {}
                for name, (total, count) in found.items():
                    before = sums.setdefault(name, [0.0, 0.0])
                    if index < len(parts):
                        sums[name] = [before[0] + float(total), before[1] + float(count)]
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
