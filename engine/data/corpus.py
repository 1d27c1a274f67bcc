"""Token shards: documents tokenized once, then read memory-mapped.

A corpus is a directory of `tokens.bin` (uint16 or uint32, little-endian), `ends.npy` (int64, the end of each document in
tokens) and `corpus.json`; it is complete or absent.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.stage import publish

CHUNK = 1024
"""Documents tokenized at a time: enough to keep all cores busy, little memory."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: document i is tokens[ends[i-1]:ends[i]]."""

    tokens: np.ndarray
    ends: np.ndarray

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Maps a finished corpus."""
        about = json.loads((directory / "corpus.json").read_text())
        return cls(np.memmap(directory / "tokens.bin", dtype=about["dtype"], mode="r"), np.load(directory / "ends.npy"))

    def windows(self, length: int) -> np.ndarray:
        """Cuts every document into windows of at most `length` tokens.

        Returns:
            (start, end) of every window in `tokens`, shape (windows, 2); no token is lost.
        """
        starts = np.concatenate([[0], self.ends[:-1]])
        counts = -(-(self.ends - starts) // length)
        document = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = starts[document] + number * length
        return np.stack([first, np.minimum(first + length, self.ends[document])], axis=1)


def write_corpus(texts: Iterator[str], tokenizer: Any, directory: Path) -> Corpus:
    """Tokenizes `texts` without special tokens into `directory`, or opens it when it is already there.

    Args:
        texts: one document each.
        tokenizer: a `tokenizers.Tokenizer`.
        directory: the corpus; written beside it first, then renamed.

    Raises:
        UserError: no tokens at all.
    """
    if directory.exists():
        return Corpus.open(directory)
    part = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
    lengths: list[int] = []
    with (part / "tokens.bin").open("wb") as file:
        while chunk := list(itertools.islice(texts, CHUNK)):
            for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
                lengths.append(len(encoding.ids))
                file.write(np.asarray(encoding.ids, dtype=dtype).tobytes())
    ends = np.cumsum([length for length in lengths if length], dtype=np.int64)
    if len(ends) == 0:
        raise UserError("the training texts hold no token: an empty corpus cannot be used")
    np.save(part / "ends.npy", ends)
    about = {"dtype": dtype, "documents": len(ends), "empty_documents": len(lengths) - len(ends), "tokens": int(ends[-1])}
    (part / "corpus.json").write_text(json.dumps(about))
    publish(part, directory)
    return Corpus.open(directory)
