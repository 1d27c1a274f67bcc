"""A progress bar with the time that is left, for whoever watches a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def progress(total: int | None, least: int = 0) -> Iterator[Any]:
    """Gives a function that is told how much more is done.

    Args:
        total: all that is to be done; None: unknown, without a bar.
        least: up to so much no bar is worth it.
    """
    if total is None or total <= least or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)
