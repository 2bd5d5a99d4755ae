"""What commands show: a console, and one bar for everything long, with the rate and the time left, on stderr.

On a terminal it is rich's live bar; bars inside bars stand under each other. Elsewhere (a log file, a pipe) it is one
line every ten seconds or so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0
_live: list[Progress] = []  # the display on the terminal, while there is one; bars inside bars share it


def console(stderr: bool = False) -> Console:
    """Where commands print. Where nobody watches (a pipe, a file), lines and tables are neither wrapped nor cut."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if terminal else 10_000)


class Bar:
    """What :func:`bar` hands out."""

    def __init__(self, description: str, total: int | None, unit: str, display: Progress | None, show: bool) -> None:
        self._description, self._total, self._unit, self._show = description, total, unit, show
        self._done, self._shown, self._note = 0, 0, ""
        self._began = self._printed = time.monotonic()
        self._display = display
        self._task: TaskID | None = display.add_task(description, total=total, facts="") if display else None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that ``count`` more units are done; a ``note`` ("loss 3.21") stands beside the bar until the next."""
        self._done, self._note = self._done + count, note or self._note
        if self._display and self._task is not None:
            self._display.update(self._task, completed=self._done, facts=self._facts(time.monotonic() - self._began))
        elif self._show and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def finish(self) -> None:
        """The bar's last line; a bar inside a bar goes."""
        if self._display and self._task is not None:
            self._display.stop_task(self._task)
            if len(self._display.tasks) > 1:
                self._display.remove_task(self._task)
        elif self._printed > self._began and self._done > self._shown:
            self._print()

    def _facts(self, seconds: float) -> str:
        rate, of = self._done / max(seconds, 1e-9), "" if self._total is None else f"/{self._total:,}"
        facts = [
            f"{self._done:,}{of} {self._unit}",
            f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s",
        ]
        if self._display is None and self._total and rate and self._done < self._total:
            facts.append(f"{timedelta(seconds=round((self._total - self._done) / rate))} left")
        return ", ".join(facts + [self._note] * bool(self._note))

    def _print(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        print(f"{self._description}: {self._facts(self._printed - self._began)}", file=sys.stderr, flush=True)


@contextmanager
def bar(description: str, total: int | None = None, unit: str = "images", show: bool = True) -> Iterator[Bar]:
    """Show progress while the block runs; call ``advance`` on what it yields.

    ``total`` is how many units there are (without it there is no time left), ``unit`` what is counted, in the plural.
    ``show`` False shows nothing, as for every process but the first.
    """
    with _display(show and sys.stderr.isatty()) as display:
        shown = Bar(description, total, unit, display, show)
        try:
            yield shown
        finally:
            shown.finish()


def track(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "images") -> Iterator[T]:
    """Pass the items on, showing how many have been taken; ``total`` defaults to the length where there is one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


@contextmanager
def _display(wanted: bool) -> Iterator[Progress | None]:
    if not wanted or _live:
        yield _live[-1] if wanted else None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as display:
        _live.append(display)
        try:
            yield display
        finally:
            _live.remove(display)
