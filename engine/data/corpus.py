"""Token shards: documents tokenized once, then read memory-mapped.

A corpus is a directory of `tokens.bin` (uint16 or uint32, little-endian), `ends.npy` (int64, the end of each document in
tokens) and `corpus.json`, which keeps the ledger; it is complete or absent.
"""

from __future__ import annotations

import json
import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.stages.stage import publish

CHUNK = 1024
"""Documents tokenized at a time: enough to keep all cores busy, little memory."""


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: document i is tokens[ends[i-1]:ends[i]]."""

    tokens: np.ndarray
    ends: np.ndarray
    ledger: dict[str, int] = field(default_factory=dict)
    """What went in and what came of it: `documents`, `empty_documents` (without a token, left out), `characters`, `bytes`,
    `tokens`, `unknown_tokens` (what the vocabulary has no word for)."""

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Maps a finished corpus."""
        about = json.loads((directory / "corpus.json").read_text())
        dtype = about.pop("dtype")
        tokens = np.memmap(directory / "tokens.bin", dtype=dtype, mode="r")
        return cls(tokens, np.load(directory / "ends.npy", mmap_mode="r"), about)

    @property
    def describe(self) -> str:
        """The ledger in words."""
        told, tokens = self.ledger, self.ledger["tokens"]
        parts = [
            f"{told['documents']:,} documents",
            f"{told['characters']:,} characters ({told['bytes']:,} bytes)",
            f"{tokens:,} tokens ({told['characters'] / tokens:.1f} characters each)",
            f"{told['unknown_tokens'] / tokens:.2%} of them unknown" if told["unknown_tokens"] else "",
            f"{told['empty_documents']:,} documents without a token left out" if told["empty_documents"] else "",
        ]
        return ", ".join(part for part in parts if part)

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

    def borders(self, windows: np.ndarray) -> np.ndarray:
        """Says of each window whether a document begins with it, and whether one ends with it, shape (windows, 2)."""
        document = np.searchsorted(self.ends, windows[:, 0], side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.stack([starts[document], self.ends[document]], axis=1) == windows


class CorpusWriter:
    """Tokenizes documents, without special tokens, into a corpus that is complete or absent.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; truncation and padding of its own are switched off.
        directory: the corpus; written beside it first, then renamed.
    """

    def __init__(self, tokenizer: Any, directory: Path) -> None:
        self.tokenizer, self.directory = tokenizer, directory
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.part = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self.dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
        self.file = (self.part / "tokens.bin").open("wb")
        self.lengths = array("q")
        self.chunk: list[str] = []
        self.unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
        self.ledger = dict.fromkeys(("documents", "empty_documents", "characters", "bytes", "tokens", "unknown_tokens"), 0)

    def add(self, text: str) -> None:
        """Adds one document."""
        self.chunk.append(text)
        if len(self.chunk) == CHUNK:
            self._flush()

    def _flush(self) -> None:
        ledger = self.ledger
        for text, encoding in zip(self.chunk, self.tokenizer.encode_batch(self.chunk, add_special_tokens=False), strict=True):
            ids = np.asarray(encoding.ids, dtype=self.dtype)
            ledger["characters"] += len(text)
            ledger["bytes"] += len(text.encode())
            ledger["unknown_tokens"] += int((ids == self.unknown).sum()) if self.unknown is not None else 0
            if len(ids) == 0:
                ledger["empty_documents"] += 1
                continue
            self.lengths.append(len(ids))
            self.file.write(ids.tobytes())
        self.chunk.clear()

    def close(self) -> Corpus:
        """Publishes the corpus and opens it.

        Raises:
            UserError: no token at all.
        """
        self._flush()
        self.file.close()
        if not self.lengths:
            raise UserError(f"the {self.directory.name} texts hold no token: give more of them, or another share")
        ends = np.cumsum(np.asarray(self.lengths, dtype=np.int64))
        np.save(self.part / "ends.npy", ends)
        ledger = {**self.ledger, "documents": len(ends), "tokens": int(ends[-1])}
        (self.part / "corpus.json").write_text(json.dumps({"dtype": self.dtype, **ledger}))
        publish(self.part, self.directory)
        return Corpus.open(self.directory)
