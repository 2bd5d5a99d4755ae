"""Stopping a run politely: SIGTERM and SIGINT are remembered, and acted on between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from digit.core.errors import DigitError


class Interrupted(DigitError):
    """A run was stopped by a signal after it had saved a checkpoint.

    Attributes:
        signum: the signal.
        exit_code: what a shell expects, 128 + signum: 143 for SIGTERM, 130 for SIGINT.
        checkpoint: the folder that was saved.
    """

    def __init__(self, signum: int, step: int, total: int, checkpoint: Path) -> None:
        self.signum, self.exit_code, self.checkpoint = signum, 128 + signum, checkpoint
        name = signal.Signals(signum).name
        super().__init__(
            f"Stopped by {name} after step {step} of {total}; the checkpoint is {checkpoint}. "
            "To go on, give the same command again; digit train wants --resume with it."
        )


class Caught:
    """The signal that came, or 0."""

    signum = 0


@contextmanager
def caught_signals() -> Iterator[Caught]:
    """Note SIGTERM and SIGINT instead of dying while the block runs; the second SIGINT raises KeyboardInterrupt at
    once.

    Outside the main thread signals cannot be caught, and nothing is.
    """
    caught = Caught()

    def note(signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and caught.signum:
            raise KeyboardInterrupt
        caught.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
