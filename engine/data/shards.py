"""Texts to token shards: by any number of processes, again after a kill, always the same shards.

The files of a source are read in units, several small ones in one; what a process has of a unit it writes shard by shard, and a
shard is complete or absent. A unit's rows are read again after a kill, without being tokenized, up to where its shards end.

`<unit>-<number>/<split>/` is a shard of a split (engine/data/corpus.py), `<unit>-<number>/part.json` says how many rows of the
unit there are up to its end, `<unit>.json` what is to be said of a finished unit, and `corpus.json` which shards there are.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from engine.config import Recipe
from engine.cpu import cores
from engine.data.cells import Cell, text_cell
from engine.data.corpus import Corpus, CorpusWriter
from engine.data.sources import SourceConfig, SourceRows, files_of
from engine.data.splits import DataConfig, parts_of, split_of
from engine.errors import UserError
from engine.stages.stage import hash_directory, publish

SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26
"""Tokens from which on a shard is full: 128 MiB of a vocabulary up to 65,536."""
UNIT_BYTES = 4
"""Bytes of files that are read as one unit, for each token of a shard."""
MAPPED = 64
"""Shards that are kept mapped."""
SAID_SECONDS = 5.0
"""A shard that took longer is told."""
CORPUS_FILE, PART_FILE = "corpus.json", "part.json"


class Unit(NamedTuple):
    """Files whose rows one process reads."""

    name: str
    split: str
    """Of its rows; `train`: shares of them may belong to others."""
    source: SourceConfig
    files: slice


class Shards(Sequence[Corpus]):
    """The shards of a split of a corpus.

    Args:
        directory: a finished corpus.
        split: one of SPLITS.
    """

    def __init__(self, directory: Path, split: str) -> None:
        told = json.loads((directory / CORPUS_FILE).read_text())
        self.directory, self.split = directory, split
        self.with_sentences: bool = told["sentences"]
        self.language: str | None = told["language"]
        self.names: list[str] = told[split]["shards"]
        self.ledger: dict[str, int] = told[split]["ledger"]
        """What went in and what came of it: `documents`, `empty_documents` (without a token, left out), `characters`, `bytes`,
        `tokens`, `unknown_tokens` (what the vocabulary has no word for)."""
        self._open = functools.lru_cache(maxsize=MAPPED)(lambda name: Corpus.open(directory / name / split))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> Corpus: ...
    @overload
    def __getitem__(self, number: slice) -> list[Corpus]: ...
    def __getitem__(self, number: int | slice) -> Corpus | list[Corpus]:
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        return self._open(self.names[number])

    def sample(self, count: int) -> np.ndarray:
        """Returns at most about so many tokens, as many from the top of each of some shards."""
        some = self[:: -(-len(self) // MAPPED)]
        return np.concatenate([shard.tokens[: -(-count // len(some))] for shard in some])

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


def units_of(data: DataConfig, recipe: Recipe, shard_tokens: int) -> list[Unit]:
    """Returns what can be read apart: neighbouring files up to about a shard, or a whole source whose `limit` counts its rows."""
    found: list[Unit] = []
    for split, part in parts_of(data).items():
        for source in part.values() if isinstance(part, dict) and split in SPLITS else ():
            sizes = [_bytes(file, UNIT_BYTES * shard_tokens) for file in files_of(source, recipe)]
            cuts = [0, len(sizes)]
            if source.limit is None:
                # A new unit begins with the file behind the one in which another so many bytes are full.
                full = np.cumsum(sizes) // (UNIT_BYTES * shard_tokens)
                cuts = sorted({*cuts, *(np.flatnonzero(np.diff(full, prepend=0)) + 1).tolist()})
            found += [
                Unit(f"{split}-{number:05}", split, source, slice(first, last))
                for number, (first, last) in enumerate(itertools.pairwise(cuts))
            ]
    return found


def _bytes(file: Path | str | dict[str, Path], unknown: int) -> int:
    paths = file.values() if isinstance(file, dict) else [file]
    return sum(path.stat().st_size if isinstance(path, Path) else unknown for path in paths)


class Builder:
    """Makes the shards of some texts.

    Args:
        data: where they come from.
        recipe: finds the files.
        text: the column of the document.
        tokenizer: a `tokenizers.Tokenizer`.
        directory: the corpus.
        sentences: note where sentences begin.
        shard_tokens: tokens from which on a shard is full.
        language: of all texts, kept with them.
    """

    def __init__(
        self,
        data: DataConfig,
        recipe: Recipe,
        text: str,
        tokenizer: Any,
        directory: Path,
        sentences: bool,
        shard_tokens: int = SHARD_TOKENS,
        language: str | None = None,
    ) -> None:
        self.data, self.recipe, self.text, self.tokenizer = data, recipe, text, tokenizer
        self.directory, self.sentences, self.shard_tokens, self.language = directory, sentences, shard_tokens, language
        self.columns: Mapping[str, Cell] = {text: text_cell}
        self.units = units_of(data, recipe, shard_tokens)

    def together(self, rank: int, processes: int, barrier: Callable[[], None]) -> dict[str, dict[str, Any]]:
        """Makes all that is missing, on all processes at once; each calls it.

        Args:
            barrier: waits for all of them.

        Returns:
            what `finish` returns, on rank 0.

        Raises:
            UserError: a file that cannot be read, a bad row, a split without a token.
        """
        busy = min(len(self.units), int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores() // busy)))  # else each would tokenize on all cores
        self.build(rank, processes)
        barrier()
        files = {}
        if rank == 0:
            files = self.finish()
            for note in self.notes:
                print(f"  {note}", flush=True)
        barrier()
        return files

    def build(self, rank: int = 0, processes: int = 1) -> None:
        """Makes this process's share of the units that are not finished.

        Raises:
            UserError: a file that cannot be read, a bad row.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        for unit in self.units[rank::processes]:
            if not self._note(unit).exists():
                self._unit(unit)

    def describe(self, processes: int) -> str:
        """Says how the work is spread."""
        files = sum(len(files_of(unit.source, self.recipe)[unit.files]) for unit in self.units)
        idle = f" ({processes - len(self.units)} of them have nothing to do)" if processes > len(self.units) else ""
        return f"files: {files:,}, read in {len(self.units):,} parts by {processes} process{'es' if processes > 1 else ''}{idle}"

    def finish(self) -> dict[str, dict[str, Any]]:
        """Says which shards there are, once every unit is finished.

        Returns:
            {file of a shard: its hash and size}, as `hash_directory` gives them.

        Raises:
            UserError: a split without a token.
        """
        about: dict[str, Any] = {"sentences": self.sentences, "language": self.language}
        for split in SPLITS:
            shards, ledger = [], dict[str, int]()
            for part in self._parts(self.units):
                if (part / split).exists():
                    told = json.loads((part / split / CORPUS_FILE).read_text())
                    told.pop("dtype")
                    ledger = {key: ledger.get(key, 0) + value for key, value in told.items()}
                    shards += [part.name] if told["tokens"] else []
            if not shards:
                raise UserError(f"the {split} texts hold no token: give more of them, or another share")
            about[split] = {"shards": shards, "ledger": ledger}
        _write(self.directory / CORPUS_FILE, about)
        files = {part.name: json.loads((part / PART_FILE).read_text())["files"] for part in self._parts(self.units)}
        return {f"{part}/{name}": entry for part, found in files.items() for name, entry in found.items()}

    @property
    def notes(self) -> list[str]:
        """What is to be said of the files that were read, a fact a line."""
        return list(dict.fromkeys(note for unit in self.units for note in json.loads(self._note(unit).read_text())))

    def _note(self, unit: Unit) -> Path:
        return self.directory / f"{unit.name}.json"

    def _parts(self, units: list[Unit]) -> list[Path]:
        """Returns what is complete of some units, in order."""
        return [part for unit in units for part in sorted(self.directory.glob(f"{unit.name}-*")) if part.suffix != ".tmp"]

    def _unit(self, unit: Unit) -> None:
        """Goes on with a unit behind its last shard."""
        done = self._parts([unit])
        count = json.loads((done[-1] / PART_FILE).read_text())["rows"] if done else 0
        source = SourceRows(unit.source, self.recipe, self.columns, files=unit.files)
        rows = itertools.islice(iter(source), count, None)
        for number in itertools.count(len(done)):
            row = next(rows, None)
            if row is None:
                break
            count += self._part(self.directory / f"{unit.name}-{number:05}", unit, itertools.chain([row], rows), count)
        _write(self._note(unit), source.describe)

    def _part(self, directory: Path, unit: Unit, rows: Iterator[Any], before: int) -> int:
        """Writes one part of a unit; returns how many rows it took."""
        part, started, taken = directory.with_suffix(".tmp"), time.monotonic(), 0
        shutil.rmtree(part, ignore_errors=True)
        writers: dict[str, CorpusWriter] = {}
        for row in rows:
            taken += 1
            text = row[self.text]
            split = split_of(self.data, text) if unit.split == "train" else unit.split
            if split in SPLITS:
                if split not in writers:
                    writers[split] = CorpusWriter(self.tokenizer, part / split, self.sentences)
                writers[split].add(text)
                if writers[split].written >= self.shard_tokens:
                    break
        part.mkdir(parents=True, exist_ok=True)
        tokens = sum(writer.close()["tokens"] for writer in writers.values())
        (part / PART_FILE).write_text(json.dumps({"rows": before + taken, "files": hash_directory(part)}))
        publish(part, directory)
        seconds = time.monotonic() - started
        if seconds > SAID_SECONDS:
            print(f"  {directory.name}: {tokens:,} tokens of {taken:,} documents ({tokens / seconds:,.0f} tokens/s)", flush=True)
        return taken


def _write(path: Path, value: Any) -> None:
    """Writes a JSON file that is complete or absent."""
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").rename(path)
