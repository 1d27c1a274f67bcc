"""Texts and pairs of texts as a tokenizer takes them, and what the tasks share that read them.

Shapes: N rows, L tokens.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engine.answers import Answers, Arrays, Metric, Row, RowError

OUTPUT = "logits"
"""What the graph of a task with the usual head gives, shape (N, numbers of a row)."""
NO_TOKEN = "a text without a single token, to a tokenizer that adds none of its own: leave the row out"
SMALLEST = float(np.finfo(np.float32).tiny)
"""A probability that rounds to 0 counts as this much in a loss."""


def limit(tokenizer: Any, max_length: int, pad_token: str | None, truncation_side: str = "right") -> None:
    """Makes a `tokenizers.Tokenizer` truncate to `max_length` tokens and pad on the right, in place.

    Raises:
        KeyError: it does not know the padding token.
    """
    pad_id = tokenizer.token_to_id(pad_token) if pad_token else None
    if pad_id is None:
        raise KeyError(pad_token)
    tokenizer.enable_truncation(max_length, direction=truncation_side)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad_token)


def texts_of(row: Row, columns: dict[str, str]) -> list[str]:
    """Returns the texts of a row.

    Args:
        columns: {name of the input: its column}; a row may use either.

    Raises:
        RowError: a text is missing, or not valid Unicode.
    """
    found = []
    for name, column in columns.items():
        text = row.get(column, row.get(name))
        if text is None:
            near = difflib.get_close_matches(column, [str(key) for key in row], n=1, cutoff=0.6)
            known = f": did you mean '{near[0]}'?" if near else f" (known: {', '.join(sorted(map(str, row)))})"
            raise RowError(f"a row has no '{column}'{known}")
        text = str(text)
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise RowError(f"'{column}' of a row is not valid Unicode (a lone surrogate): {text[:40]!a}")
        found.append(text)
    return found


def encodings(tokenizer: Any, rows: Sequence[Row], columns: dict[str, str]) -> list[Any]:
    """Tokenizes rows with one or two texts each; what truncation cut is in an encoding's `overflowing`."""
    texts = [texts_of(row, columns) for row in rows]
    return tokenizer.encode_batch([tuple(row) if len(row) > 1 else row[0] for row in texts])


def arrays_of(encoded: list[Any]) -> Arrays:
    """Returns int64 input_ids, attention_mask and token_type_ids of shape (N, L), as the tokenizer padded them."""
    return {
        "input_ids": np.array([row.ids for row in encoded], dtype=np.int64),
        "attention_mask": np.array([row.attention_mask for row in encoded], dtype=np.int64),
        "token_type_ids": np.array([row.type_ids for row in encoded], dtype=np.int64),
    }


def identity(texts: list[str]) -> str:
    """Returns the id of a row: equal texts have equal ids in every file and split."""
    return hashlib.sha256("\t".join(texts).encode()).hexdigest()[:16]


def digits(values: Any) -> list[float]:
    """Returns float32 numbers as Python numbers of the fewest digits that read back as the same bits."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


class TextAnswers(Answers):
    """The answering half of a task on texts; facts: `text` and, for pairs, `text_pair`: the columns; `metric`, one of METRICS."""

    METRICS: ClassVar[dict[str, Metric]] = {}
    """What may choose the best weights."""

    @property
    def metric(self) -> Metric:
        return self.METRICS[self.facts["metric"]]

    @property
    def columns(self) -> dict[str, str]:
        pair = self.facts.get("text_pair")
        return {"text": self.facts["text"], **({"text_pair": pair} if pair else {})}

    def encode(self, rows: Sequence[Row]) -> list[Any]:
        """Tokenizes rows; the encodings are padded to the longest."""
        return encodings(self.tokenizer, rows, self.columns)

    def prepare(self, rows: Sequence[Row]) -> Arrays:
        arrays = arrays_of(self.encode(rows))
        if not arrays["attention_mask"].any(axis=1).all():
            raise RowError(NO_TOKEN)
        return arrays

    def identity(self, row: Row) -> str:
        """Returns the id of a row, see `identity`."""
        return identity(texts_of(row, self.columns))
