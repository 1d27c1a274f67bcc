"""What is printed reaches any terminal and any pipe: characters that it lacks are replaced, a reader may leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

COLOURS = (117, 120, 153, 156, 180, 183, 210, 216, 219, 222, 229, 151)
"""Light backgrounds of the 256 colours of terminals, under black letters."""


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


def takes_colours(stream: Any) -> bool:
    """True for a terminal whose user has not asked for plain text (https://no-color.org)."""
    return bool(getattr(stream, "isatty", lambda: False)()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def coloured(text: str, kind: str) -> str:
    """Returns a text in the colours of its kind, and the kind behind it: equal kinds have equal colours in every run."""
    background = COLOURS[zlib.crc32(kind.encode()) % len(COLOURS)]
    return f"\x1b[30;48;5;{background}m{text}\x1b[1m [{kind}]\x1b[0m"


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
