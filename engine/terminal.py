"""What is printed reaches any terminal and any pipe: characters that it lacks are replaced, a reader may leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class ReaderGone(BaseException):
    """Nobody reads the standard output any more. No OSError: typer and rich would end the process with status 1."""


@contextlib.contextmanager
def printing(outlive_reader: bool = False) -> Iterator[None]:
    """While the body runs, standard output takes any text.

    Args:
        outlive_reader: work on silently when the reader has left, as behind `| head -1`.

    Raises:
        ReaderGone: it has left; what is still to be printed goes nowhere.
    """
    before = sys.stdout
    if before is None:  # closed by who has started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    elif isinstance(before, io.TextIOWrapper):
        before.flush()
        sys.stdout = _Output(before.buffer, before.encoding, "replace", line_buffering=before.line_buffering)
        sys.stdout.outlive_reader = outlive_reader
    try:
        yield
        sys.stdout.flush()  # a reader that has gone shows here, not when Python ends
    finally:
        if sys.stdout is not before:
            sys.stdout.close()
        sys.stdout = before


def speaks_unicode(stream: Any) -> bool:
    """True when every character can be written to a stream as it is."""
    return str(getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


class _Output(io.TextIOWrapper):
    """Standard output whose reader may leave."""

    outlive_reader = False

    def write(self, text: str, /) -> int:
        with self._watched():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._watched():
            super().flush()

    def close(self) -> None:
        self.flush()  # the buffer belongs to the stream that this one stands for

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is buffered is flushed into nothing; Python would complain of it when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not self.outlive_reader:
                raise ReaderGone from None
