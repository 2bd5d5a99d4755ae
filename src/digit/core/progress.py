"""One way to show that something long is going on: a bar with the rate and the time left, on stderr.

On a terminal it is a live bar. Elsewhere (a log file, a pipe) it is quiet, and prints one line every ten seconds or so.
Bars may be nested; they then stand under each other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0

_lock = threading.Lock()
_live: list[Progress] = []  # the display on the terminal, while there is one; bars inside bars share it


def console(stderr: bool = False) -> Console:
    """Where commands print. Where nobody watches (a pipe, a file), lines and tables are neither wrapped nor cut."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if terminal else 10_000)


class Bar(Protocol):
    """What :func:`bar` hands out."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that ``count`` more units are done; ``note`` (such as "loss 3.21") stands beside the bar until the
        next.
        """


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_count(task.completed, task.total, task.fields["unit"]), style="progress.download")


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


class _LiveBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int = 1, note: str = "") -> None:
        if note:
            self._progress.update(self._task, note=note)
        self._progress.advance(self._task, count)


class _LineBar:
    """A line on stderr now and then, for output that is not a terminal."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._shown, self._note = 0, 0, ""
        self._began = self._printed = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        if self._printed > self._began and self._done > self._shown:
            self._print()

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        rate = self._done / max(self._printed - self._began, 1e-9)
        parts = [_count(self._done, self._total, self._unit), f"{_rate(rate)} {self._unit}/s"]
        if self._total and rate and self._done < self._total:
            parts.append(f"{_duration((self._total - self._done) / rate)} left")
        print(f"{self._description}: {', '.join(parts + [self._note] * bool(self._note))}", file=sys.stderr, flush=True)


class _SilentBar:
    def advance(self, count: int = 1, note: str = "") -> None:
        pass


@contextmanager
def bar(description: str, total: int | None = None, unit: str = "images", show: bool = True) -> Iterator[Bar]:
    """Show progress while the block runs; call ``advance`` on what it yields.

    Args:
        description: what is being done, as in "Fitting the codebook".
        total: how many units there are; without it there is no time left.
        unit: what is counted, in the plural.
        show: False shows nothing, as for every process but the first.
    """
    if not show:
        yield _SilentBar()
    elif not sys.stderr.isatty():
        lines = _LineBar(description, total, unit)
        yield lines
        lines.finish()
    else:
        with _display() as progress:
            task = progress.add_task(description, total=total, unit=unit, note="")
            try:
                yield _LiveBar(progress, task)
            finally:
                progress.stop_task(task)
                if len(progress.tasks) > 1:  # a bar inside a bar goes when it is done
                    progress.remove_task(task)


def track(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "images") -> Iterator[T]:
    """Pass the items on, showing how many have been taken; ``total`` defaults to the length where there is one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


@contextmanager
def _display() -> Iterator[Progress]:
    with _lock:
        outer = _live[-1] if _live else None
    if outer is not None:
        yield outer
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _CountColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        _live.append(progress)
        try:
            yield progress
        finally:
            _live.remove(progress)


def _count(done: float, total: float | None, unit: str) -> str:
    return f"{int(done):,} {unit}" if total is None else f"{int(done):,}/{int(total):,} {unit}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
