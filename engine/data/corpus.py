"""One shard of a tokenized corpus: documents tokenized once, then read memory-mapped.

It is a directory of `tokens.bin` (uint16 or uint32, little-endian), `ends.npy` (int64, the end of each document in tokens),
`sentences.npy` where they were asked for, and `corpus.json`, which keeps the ledger.
"""

from __future__ import annotations

import json
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.sentences import sentence_starts

DRAWS = 20
"""Documents that are drawn in search of a long one."""
CHUNK, CHUNK_CHARACTERS = 1024, 2**22
"""Documents tokenized at a time, and their characters from which on it is fewer: enough to keep all cores busy, little memory."""


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents: number i is tokens[ends[i-1]:ends[i]]."""

    tokens: np.ndarray
    ends: np.ndarray
    ledger: dict[str, int] = field(default_factory=dict)
    """What went in and what came of it: `documents`, `empty_documents` (without a token, left out), `characters`, `bytes`,
    `tokens`, `unknown_tokens` (what the vocabulary has no word for)."""
    sentences: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Places in `tokens` where a sentence begins within a document, in order; empty where nobody asked for them."""

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Maps a finished shard."""
        about = json.loads((directory / "corpus.json").read_text())
        dtype = about.pop("dtype")
        tokens = np.memmap(directory / "tokens.bin", dtype=dtype, mode="r")
        found = directory / "sentences.npy"
        sentences = {"sentences": np.load(found, mmap_mode="r")} if found.exists() else {}
        return cls(tokens, np.load(directory / "ends.npy", mmap_mode="r"), about, **sentences)

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

    def sentences_in(self, first: int, last: int) -> np.ndarray:
        """Returns the places between `first` and `last`, both left out, where a sentence begins."""
        return self.sentences[np.searchsorted(self.sentences, first, "right") : np.searchsorted(self.sentences, last)]

    def elsewhere(self, place: int, count: int, rng: np.random.Generator) -> np.ndarray | None:
        """Returns so many tokens of another document than that of a place, drawn at random; None: none that was drawn is as long.

        They begin with a sentence where one begins in the document early enough, else anywhere.
        """
        own = int(np.searchsorted(self.ends, place, side="right"))
        for other in rng.integers(0, len(self.ends), DRAWS):
            first, end = int(self.ends[other - 1]) if other else 0, int(self.ends[other])
            if other == own or end - first < count:
                continue
            starts = np.append(first, self.sentences_in(first, end - count + 1))
            at = int(rng.choice(starts if len(self.sentences) else np.arange(first, end - count + 1)))
            return self.tokens[at : at + count]
        return None

    def borders(self, windows: np.ndarray) -> np.ndarray:
        """Says of each window whether a document begins with it, and whether one ends with it, shape (windows, 2)."""
        document = np.searchsorted(self.ends, windows[:, 0], side="right")
        starts = np.concatenate([[0], self.ends[:-1]])
        return np.stack([starts[document], self.ends[document]], axis=1) == windows


class CorpusWriter:
    """Tokenizes documents, without special tokens, into a corpus.

    A chunk of them is tokenized while the next one is read.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; truncation and padding of its own are switched off.
        directory: the corpus; an empty directory, or none.
        sentences: note where sentences begin.
    """

    def __init__(self, tokenizer: Any, directory: Path, sentences: bool = False) -> None:
        self.tokenizer, self.directory = tokenizer, directory
        self.sentences = array("q") if sentences else None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.encode = tokenizer.encode_batch if sentences else tokenizer.encode_batch_fast  # the latter finds no offsets
        directory.mkdir(parents=True, exist_ok=True)
        self.dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
        self.file = (directory / "tokens.bin").open("wb")
        self.lengths, self.written = array("q"), 0
        self.chunk: list[str] = []
        self.characters = 0
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self.coming: tuple[list[str], Future[Any]] | None = None
        self.unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
        self.ledger = dict.fromkeys(("documents", "empty_documents", "characters", "bytes", "tokens", "unknown_tokens"), 0)

    def add(self, text: str) -> None:
        """Adds one document."""
        self.chunk.append(text)
        self.characters += len(text)
        if len(self.chunk) == CHUNK or self.characters >= CHUNK_CHARACTERS:
            self._next()

    def _next(self) -> None:
        """Begins with the chunk that was read, and writes the one before."""
        before, self.coming = self.coming, (self.chunk, self.pool.submit(self.encode, self.chunk, add_special_tokens=False))
        self.chunk, self.characters = [], 0
        if before is not None:
            self._write(before[0], before[1].result())

    def _write(self, texts: list[str], encodings: list[Any]) -> None:
        ledger = self.ledger
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.asarray(encoding.ids, dtype=self.dtype)
            ledger["characters"] += len(text)
            ledger["bytes"] += len(text.encode())
            ledger["unknown_tokens"] += int((ids == self.unknown).sum()) if self.unknown is not None else 0
            if len(ids) == 0:
                ledger["empty_documents"] += 1
                continue
            if self.sentences is not None:
                firsts = np.asarray([begin for begin, _ in encoding.offsets])
                inside = np.unique(np.searchsorted(firsts, sentence_starts(text)))
                self.sentences.extend(int(place) + self.written for place in inside if 0 < place < len(ids))
            self.written += len(ids)
            self.lengths.append(len(ids))
            self.file.write(ids.tobytes())

    def close(self) -> dict[str, int]:
        """Writes what is left and returns the ledger."""
        self._next()
        assert self.coming is not None
        self._write(self.coming[0], self.coming[1].result())
        self.pool.shutdown()
        self.file.close()
        np.save(self.directory / "ends.npy", np.cumsum(np.asarray(self.lengths, dtype=np.int64)))
        if self.sentences is not None:
            np.save(self.directory / "sentences.npy", np.asarray(self.sentences, dtype=np.int64))
        ledger = {**self.ledger, "documents": len(self.lengths), "tokens": self.written}
        (self.directory / "corpus.json").write_text(json.dumps({"dtype": self.dtype, **ledger}))
        return ledger
