"""Signs of life: every rank leaves its current phase in a small file, which the launcher of its node reads.

One write of a few bytes into the page cache for each phase, about a microsecond; nothing is flushed to disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = "BOTHWAYS_ERROR_DIRECTORY"
"""Environment variable: where the ranks of a stage leave their heartbeats and records; absent when nobody watches."""
PHASES: dict[str, float] = {
    "start": math.inf,  # imports and rendezvous, which has a limit of its own
    "prepare": math.inf,  # the main rank may tokenize a large corpus for hours
    "load": 10.0,
    "convert": math.inf,
    "data": 1.0,
    "forward": 1.0,
    "update": 1.0,
    "evaluate": 1.0,  # beaten for every batch
    "save": 10.0,
    "finish": 10.0,
}
"""Which multiple of the heartbeat limit a phase may last, in the order in which a run comes to them."""
MEANINGS = {
    "start": "imports, rendezvous",
    "prepare": "tokenizing, building the model",
    "update": "backward, all-reduce, optimizer step",
    "finish": "judging and publishing the result",
}
"""What happens in the phases whose names do not say it all."""
FIRST_STEP = 10.0
"""Further multiple for the first step of a process, which may compile kernels and open connections."""

_NAMES = list(PHASES)
# Time at both ends: a beat that is being written while it is read has two different ones.
_FORMAT = struct.Struct("<diiqi?d")
_NO_STEP = -1


@dataclass(frozen=True)
class Beat:
    """The latest sign of life of a rank."""

    rank: int
    pid: int
    phase: str
    """It entered this phase last."""
    step: int | None
    """Optimizer step; None before training."""
    age_seconds: float
    """How long ago."""
    warm: bool = True
    """It has got past the first step of its process."""

    @property
    def allowed(self) -> float:
        """How long it may stay in its phase, as a multiple of the heartbeat limit."""
        return PHASES[self.phase] * (1.0 if self.warm else FIRST_STEP)

    @property
    def where(self) -> str:
        """`update (backward, all-reduce, optimizer step) at step 412`."""
        meaning = f" ({MEANINGS[self.phase]})" if self.phase in MEANINGS else ""
        return f"{self.phase}{meaning}" + ("" if self.step is None else f" at step {self.step}")


class _Writer:
    def __init__(self, directory: str) -> None:
        self.rank, self.pid = int(os.environ.get("RANK", "0")), os.getpid()
        self.file = os.open(Path(directory, f"beat{self.rank}"), os.O_WRONLY | os.O_CREAT, 0o644)
        self.first: int | None = None
        self.step = _NO_STEP
        self.warm = False

    def write(self, phase: str, step: int | None) -> None:
        if step is not None and not self.warm:
            self.first = step if self.first is None else self.first
            self.warm = step > self.first
        self.step = self.step if step is None else step
        now = time.time()
        os.pwrite(self.file, _FORMAT.pack(now, self.rank, self.pid, self.step, _NAMES.index(phase), self.warm, now), 0)


_writer: _Writer | None = None


def beat(phase: str, step: int | None = None) -> None:
    """Says that this rank has just entered a phase.

    Args:
        phase: one of PHASES.
        step: optimizer step; None: the one of the beat before.
    """
    global _writer
    if _writer is None:
        directory = os.environ.get(DIRECTORY)
        if directory is None:
            return
        with contextlib.suppress(OSError):  # the directory has been cleaned away
            _writer = _Writer(directory)
    if _writer is not None:
        with contextlib.suppress(OSError):  # a full disk ends training where it writes its results, not here
            _writer.write(phase, step)


def last() -> Beat | None:
    """Returns this process's own latest beat."""
    beats = read(Path(os.environ[DIRECTORY])) if DIRECTORY in os.environ else []
    return next((found for found in beats if found.pid == os.getpid()), None)


def read(directory: Path) -> list[Beat]:
    """Returns the latest beat of every rank, in rank order; one that is just being written is left out."""
    beats = []
    for path in Path(directory).glob("beat[0-9]*"):
        with contextlib.suppress(OSError, struct.error):
            then, rank, pid, step, phase, warm, again = _FORMAT.unpack(path.read_bytes())
            if then == again:
                age = max(0.0, time.time() - then)
                beats.append(Beat(rank, pid, _NAMES[phase], None if step == _NO_STEP else step, age, warm))
    return sorted(beats, key=lambda found: found.rank)
