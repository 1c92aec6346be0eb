"""Progress with a rate and an ETA: a live bar on a terminal, a plain line every few seconds elsewhere."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
StageProgress = Callable[[str, int, int], None]  # told what is being done, steps done, steps in all
_LINE_EVERY = 5.0  # seconds between plain lines


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "…/s", style="progress.data.speed")


class Meter:
    """Counts work done; use as a context manager. `note` is a short text shown beside the bar, e.g. a loss.

    A total of 0 means that it is not known. Of the processes of one torchrun only the first shows anything.
    """

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self._description, self._total, self._done, self._first = description, total, done, done
        self._started = self._shown = time.monotonic()
        self._console = Console(stderr=True)
        self._shows = os.environ.get("RANK", "0") == "0"
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        if self._shows and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self._console
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._description, total=self._total or None, completed=self._done, note=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        else:
            self._line("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count work done."""
        self._done += count
        if self._bar:
            self._bar.update(self._task, advance=count, note=note)
        elif time.monotonic() - self._shown > _LINE_EVERY:
            self._line(note)

    def _line(self, note: str) -> None:
        self._shown = time.monotonic()
        if not self._shows:
            return
        seconds = max(self._shown - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        known = f"/{self._total}, {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
        line = f"{self._description}: {self._done}{known}, {rate:.1f}/s {note}".rstrip()
        print(line, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a meter; total defaults to the length of a sized iterable."""
    count = total if total is not None else len(iterable) if isinstance(iterable, Sized) else 0
    with Meter(description, count) as meter:
        for item in iterable:
            yield item
            meter.advance()


class StageMeters:
    """A callback `(stage, done, total)` for work that passes through several stages; shows a meter for each."""

    def __init__(self) -> None:
        self._stage = ""
        self._meter: Meter | None = None
        self._done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._meter is None:
            self.close()
            self._stage, self._done = stage, 0
            self._meter = Meter(stage, total).__enter__()
        self._meter.advance(done - self._done)
        self._done = done

    def close(self) -> None:
        """End the current stage's meter."""
        if self._meter:
            self._meter.__exit__()
        self._meter = None
