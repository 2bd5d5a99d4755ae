"""One worker and a bounded queue: a server that many ask at once stays alive, and says so when it is full."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from digit.core.errors import DigitError


class Refused(DigitError):
    """A request that is not served, and HTTP's ``status`` for it."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Cancelled(Exception):
    """The client has left; raised in the worker's thread and seen by nobody."""


class Job:
    """One request at the worker, which may run so many ``seconds``. It is made in the event loop; :meth:`check` and
    :meth:`report` are for the worker's thread.
    """

    def __init__(self, worker: ThreadPoolExecutor, seconds: float, work: Callable[[Job], Any]) -> None:
        self.seconds = seconds
        self.watcher: asyncio.Task[None] | None = None  # held here, for a task that nobody holds may vanish
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()
        self._left = threading.Event()
        self._deadline = float("inf")
        self.future = worker.submit(self._run, work)

    def _run(self, work: Callable[[Job], Any]) -> None:
        self._deadline = time.monotonic() + self.seconds
        try:
            self.check()
            self._tell("result", work(self))
        except Cancelled:
            pass
        except Exception as error:
            self._tell("error", error)

    def check(self) -> None:
        """Called often during the work. Cancelled: nobody waits for the result any more. Refused: the time is over."""
        if self._left.is_set():
            raise Cancelled
        if time.monotonic() > self._deadline:
            limit = f"This took more than the {self.seconds:g} seconds that a request may run."
            raise Refused(f"{limit} Ask for fewer images or steps.", 503)

    def report(self, value: Any) -> None:
        """Tell the client how far the work is; checks as well."""
        self.check()
        self._tell("progress", value)

    def _tell(self, *event: Any) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """("progress", value) as often as reported, then ("result", value) or ("error", exception); it ends early when
        the job is cancelled, and cancels the job when it is closed.
        """
        try:
            while (event := await self._events.get()) is not None:
                yield event
                if event[0] != "progress":
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """The client has left: a job that waits is dropped at once, one that runs stops at its next check."""
        self._left.set()
        self.future.cancel()
        self._events.put_nowait(None)


class JobQueue:
    """First come, first served, by one worker thread; for the event loop alone. So many jobs may wait beside the one
    that runs, which may take so many seconds.
    """

    def __init__(self, waiting: int, seconds: float) -> None:
        self.waiting, self.seconds = waiting, seconds
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="digit-worker")
        self._unfinished: set[Future[None]] = set()

    @property
    def active(self) -> int:
        """Jobs that wait or run."""
        return len(self._unfinished)

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queue a job. Refused: the queue is full."""
        if self.active > self.waiting:
            raise Refused(f"The server is busy: {self.waiting} requests are waiting. Try again in a moment.", 429)
        job = Job(self._worker, self.seconds, work)
        self._unfinished.add(job.future)
        job.future.add_done_callback(self._unfinished.discard)
        return job
