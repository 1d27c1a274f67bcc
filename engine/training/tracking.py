"""What a run shows while it works: a progress bar, a line per log interval without a terminal, history.jsonl, TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.training.checkpoint import TrainState

LOG_EVERY = 10
"""Optimizer steps between two records of loss and throughput."""
QUIET_SECONDS = 10.0
"""Without a terminal, a progress line at most this often."""


class Tracker:
    """Progress of one training stage; silent on all ranks but the main one."""

    def __init__(self, title: str, directory: Path, total_steps: int, main: bool) -> None:
        self.main = main
        self.title = title
        self.total = total_steps
        self.history = directory / "history.jsonl"
        self.board: Any = None
        if not main:
            return
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=total_steps, shown="")
        self.last_line = 0.0

    def start(self, step: int | None) -> None:
        """Begins after optimizer step `step`, None for a new run; later records, left by a run that was killed, are dropped."""
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        begin = -1 if step is None else step
        self.rewind(begin)
        self.board = SummaryWriter(str(self.history.with_name("tensorboard")), purge_step=begin + 1)
        self.progress.update(self.task, completed=max(begin, 0))
        self.progress.start()

    def rewind(self, step: int) -> None:
        """Drops the records of later steps."""
        if not self.main:
            return
        lines = self.history.read_text().splitlines(keepends=True) if self.history.exists() else []
        # The last line may be torn.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        part = self.history.with_suffix(".tmp")
        part.write_text("".join(kept))
        part.rename(self.history)

    def say(self, text: str) -> None:
        """Prints one line beside the bar."""
        if self.main:
            self.console.print(f"  {text}", soft_wrap=True)

    def record(self, state: TrainState, **values: Any) -> None:
        """Writes one line of history and the same numbers to TensorBoard."""
        if not self.main:
            return
        with self.history.open("a") as file:
            file.write(json.dumps({"step": state.step, "total_steps": self.total, **values}) + "\n")
        flat = {"train": values} if "validation" not in values else {"validation": values["validation"]}
        for group, numbers in flat.items():
            for name, value in numbers.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{group}/{name}", value, state.step)

    def advance(self, state: TrainState, loss: float, tokens_per_second: float) -> None:
        """Moves the bar."""
        if not self.main:
            return
        shown = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, completed=state.step, shown=shown)
        if not self.console.is_terminal and (time.monotonic() - self.last_line > QUIET_SECONDS or state.step == self.total):
            self.last_line = time.monotonic()
            done = max(state.step, 1)
            left = state.seconds / done * (self.total - done)
            self.say(f"{self.title}  step {state.step}/{self.total}  {shown}  {left:.0f} s left")

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        if self.main:
            self.progress.stop()
            if self.board is not None:
                self.board.close()
