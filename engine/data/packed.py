"""Batches of packed rows: documents side by side, as an objective corrupts them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.batches import BatchPlan
from engine.data.packing import PackedRows
from engine.randomness import generator

if TYPE_CHECKING:
    from engine.data.batches import Batch
    from engine.data.corpus import Corpus
    from engine.evaluate import Ranks
    from engine.objectives import Objective

PROBE_LOGITS = 64


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
        around = [token is not None for token in (self.frame.before, self.frame.after)]
        self.windows = corpus.windows(length - sum(around))
        # Where each piece has the token before it, and the one behind it.
        self.framed = np.broadcast_to(around, self.windows.shape) & (self.frame.pieces | corpus.borders(self.windows))
        self.packed = PackedRows(self.windows[:, 1] - self.windows[:, 0] + self.framed.sum(axis=1), length, seed)
        self.plan = BatchPlan(np.full(len(self.packed), length), batch_size, seed, bucket=False)
        self.steps_per_epoch = self.plan.steps_per_epoch

    @property
    def describe(self) -> str:
        """Size of the data and how full the rows are."""
        return (
            f"{len(self.corpus.ends):,} documents, {self.corpus.ends[-1]:,} tokens, {len(self.windows):,} pieces in "
            f"{len(self.packed):,} rows of {self.length} ({self.packed.fill:.1%} filled), {self.steps_per_epoch:,} steps an epoch"
        )

    def piece(self, number: int) -> np.ndarray:
        """Returns the tokens of a piece with what stands around it, int64."""
        first, last = self.windows[number]
        before, after = ([token] if there else [] for token, there in zip(self.frame[:2], self.framed[number], strict=True))
        return np.concatenate([before, self.corpus.tokens[first:last], after]).astype(np.int64)

    def row(self, epoch: int, row: int) -> dict[str, np.ndarray]:
        """Returns position_ids, segments and the columns of the objective of one packed row, each of shape (length,)."""
        empty = {"position_ids": 0, "segments": 0, **self.objective.columns}
        columns = {
            name: np.full(self.length, self.pad if value is None else value, dtype=np.int64) for name, value in empty.items()
        }
        at = 0
        for number, piece in enumerate(self.packed.row(epoch, row), 1):
            tokens = self.piece(piece)
            place = slice(at, at + len(tokens))
            for name, values in self.objective.corrupt(tokens, generator(self.seed, "mask", epoch, piece)).items():
                columns[name][place] = values
            columns["position_ids"][place] = np.arange(len(tokens))
            columns["segments"][place] = number
            at += len(tokens)
        return columns

    def collate(self, epoch: int, rows: np.ndarray) -> Batch:
        """Stacks rows into tensors of shape (rows, length), with `count` and `tokens`."""
        import torch

        columns = [self.row(epoch, int(row)) for row in rows]
        arrays = {name: np.stack([column[name] for column in columns]) for name in columns[0]}
        batch: Batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["count"] = self.objective.count(arrays)
        batch["tokens"] = int((arrays["segments"] > 0).sum())
        return batch

    def at(self, step: int, rank: int, processes: int, micro: int) -> list[Batch]:
        """Returns this rank's micro batches of `step`."""
        epoch, _ = self.plan.position(step)
        return [self.collate(epoch, rows) for rows in self.plan.micro_batches(step, rank, processes, micro)]

    def evaluate(self, model: Any, ranks: Ranks) -> dict[str, float]:
        """Returns loss (nats per predicted token), perplexity and predicted tokens over all rows, always corrupted alike."""
        import torch

        rows = np.arange(len(self.packed))
        parts = np.array_split(rows, max(1, -(-len(rows) // 32)))
        training = model.training
        model.eval()
        total = count = 0.0
        with torch.no_grad():
            for turn in range(-(-len(parts) // ranks.processes)):
                ranks.poll()
                index = turn * ranks.processes + ranks.rank
                batch = self._on(model, self.collate(0, parts[min(index, len(parts) - 1)]))
                loss, targets = self.objective.loss(model, batch)
                if index < len(parts):
                    total, count = total + float(loss), count + float(targets)
        model.train(training)
        total, count = ranks.sum(total, count)
        return {"loss": total / count, "perplexity": math.exp(min(total / count, 50.0)), "predicted_tokens": count}

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
