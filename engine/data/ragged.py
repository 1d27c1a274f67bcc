"""Arrays of different lengths on disk, one for each example: one after the other in a file that is read in place.

Shapes: N examples, T of the longest of some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class RaggedArray:
    """Arrays of shape (t, …) that differ in t, float32; all of them have one shape (…)."""

    def __init__(self, directory: Path, name: str) -> None:
        self.values = np.load(directory / f"{name}.npy", mmap_mode="r")
        self.ends_N = np.load(directory / f"{name}.ends.npy")

    def __len__(self) -> int:
        return len(self.ends_N)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Returns the arrays of some examples, filled up with zeros to the longest, shape (len(rows), T, …); T is at least 1."""
        starts, ends = np.concatenate([[0], self.ends_N])[rows], self.ends_N[rows]
        found = np.zeros((len(rows), max(1, *(ends - starts)), *self.values.shape[1:]), dtype=np.float32)
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            found[row, : end - start] = self.values[start:end]
        return found


def write_ragged(arrays: Sequence[np.ndarray], directory: Path, name: str) -> None:
    """Writes what `RaggedArray` reads."""
    np.save(directory / f"{name}.npy", np.concatenate(arrays).astype(np.float32))
    np.save(directory / f"{name}.ends.npy", np.cumsum([len(array) for array in arrays]))
