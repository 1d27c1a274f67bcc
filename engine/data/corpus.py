"""Token shards: documents tokenized once, then read memory-mapped.

A corpus is a directory of `tokens.bin` (uint16 or uint32, little-endian), `ends.npy` (int64, the end of each document in
tokens), `sentences.npy` where they were asked for, and `corpus.json`, which keeps the ledger; it is complete or absent.
"""

from __future__ import annotations

import json
import shutil
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.sentences import sentence_starts
from engine.errors import UserError
from engine.stages.stage import publish

DRAWS = 20
"""Documents that are drawn in search of a long one."""
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
    sentences: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Places in `tokens` where a sentence begins within a document, in order; empty where nobody asked for them."""

    @classmethod
    def open(cls, directory: Path) -> Corpus:
        """Maps a finished corpus."""
        about = json.loads((directory / "corpus.json").read_text())
        dtype = about.pop("dtype")
        tokens = np.memmap(directory / "tokens.bin", dtype=dtype, mode="r")
        found = directory / "sentences.npy"
        sentences = {"sentences": np.load(found, mmap_mode="r")} if found.exists() else {}
        return cls(tokens, np.load(directory / "ends.npy", mmap_mode="r"), about, **sentences)

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
    """Tokenizes documents, without special tokens, into a corpus that is complete or absent.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; truncation and padding of its own are switched off.
        directory: the corpus; written beside it first, then renamed.
        sentences: note where sentences begin.
    """

    def __init__(self, tokenizer: Any, directory: Path, sentences: bool = False) -> None:
        self.tokenizer, self.directory = tokenizer, directory
        self.sentences = array("q") if sentences else None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.part = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        self.dtype = "<u2" if tokenizer.get_vocab_size() <= 2**16 else "<u4"
        self.file = (self.part / "tokens.bin").open("wb")
        self.lengths, self.written = array("q"), 0
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
            if self.sentences is not None:
                firsts = np.asarray([begin for begin, _ in encoding.offsets])
                inside = np.unique(np.searchsorted(firsts, sentence_starts(text)))
                self.sentences.extend(int(place) + self.written for place in inside if 0 < place < len(ids))
            self.written += len(ids)
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
        if self.sentences is not None:
            np.save(self.part / "sentences.npy", np.asarray(self.sentences, dtype=np.int64))
        ledger = {**self.ledger, "documents": len(ends), "tokens": int(ends[-1])}
        (self.part / "corpus.json").write_text(json.dumps({"dtype": self.dtype, **ledger}))
        publish(self.part, self.directory)
        return Corpus.open(self.directory)
