"""One worker and a bounded waiting room: a server that many ask at once stays alive, and says so when it is full."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from digit.core.config import config
from digit.core.errors import DigitError
from digit.models.transformer import PositiveInt

T = TypeVar("T")
MIB = 1 << 20


class Refused(DigitError):
    """A request that is not served. Its text is for the person who asked; ``status`` is HTTP's number for it."""

    status: ClassVar[int] = 400


class Busy(Refused):
    """The waiting room is full; it is worth trying again."""

    status = 429


class TooLarge(Refused):
    """More bytes, pixels or pictures than are taken."""

    status = 413


class TookTooLong(Refused):
    """The work was cut off."""

    status = 503


class Gone(Exception):
    """The one who asked has left; raised in the worker, and seen by nobody."""


@config
class Limits:
    """What a server takes upon itself.

    Attributes:
        waiting: requests that may wait for their turn; one is worked on.
        pictures: a request may ask for.
        seconds: a request may be worked on, not counting the wait.
        upload_mb: size of an uploaded file in MiB.
        megapixels: of an uploaded picture; a small file can unpack into gigabytes.
        memory_mb: MiB that all waiting requests together may hold.
        sessions: pages whose choices are remembered.
    """

    waiting: Annotated[int, Field(ge=0)] = 64
    pictures: PositiveInt = 16
    seconds: Annotated[float, Field(gt=0)] = 120.0
    upload_mb: PositiveInt = 10
    megapixels: PositiveInt = 40
    memory_mb: PositiveInt = 256
    sessions: PositiveInt = 200

    @property
    def upload_bytes(self) -> int:
        """Bytes of an uploaded file."""
        return self.upload_mb * MIB

    @property
    def body_bytes(self) -> int:
        """Bytes of a request: a file takes a third more as base64, and there are some words around it."""
        return self.upload_bytes * 4 // 3 + 64 * 1024


class Budget:
    """Bytes that requests hold while they wait.

    Args:
        most: together.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._lock = threading.Lock()

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A block that may take bytes, and gives them back at its end.

        Raises:
            Busy: by the function that is handed out, when others hold too many.
        """
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            with self._lock:
                if self.held + count > self.most:
                    raise Busy("The server holds as many requests as its memory is meant for. Try again in a moment.")
                self.held += count
                mine += count

        try:
            yield take
        finally:
            with self._lock:
                self.held -= mine


class Visit:
    """One request at the worker: through it the work hears that it should stop, and tells how far it is.

    Args:
        seconds: the work may take from :meth:`begin` on.
        tell: called in the worker's thread with what :meth:`news` was given; None drops it.
    """

    def __init__(self, seconds: float, tell: Callable[[Any], None] | None = None) -> None:
        self.seconds, self._tell = seconds, tell
        self._left = threading.Event()
        self._until = float("inf")

    def begin(self, work: Callable[[Visit], T]) -> T:
        """Do the work; its time runs from now on."""
        self._until = time.monotonic() + self.seconds
        self.check()
        return work(self)

    def leave(self) -> None:
        """The one who asked has left."""
        self._left.set()

    def check(self) -> None:
        """Call this often during the work.

        Raises:
            Gone: nobody waits for the result any more.
            TookTooLong: the time is over.
        """
        if self._left.is_set():
            raise Gone
        if time.monotonic() > self._until:
            raise TookTooLong(
                f"This took more than the {self.seconds:g} seconds that a request may take here. Ask for fewer pictures or steps."
            )

    def news(self, value: Any) -> None:
        """Tell how far the work is; checks as well."""
        self.check()
        if self._tell is not None:
            self._tell(value)


class Desk:
    """One worker, first come, first served, and chairs for those who wait.

    Args:
        limits: chairs and seconds.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = Budget(limits.memory_mb * MIB)
        self._places = threading.BoundedSemaphore(limits.waiting + 1)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="digit-worker")
        self._inside = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """Requests that wait or are worked on."""
        return self._inside

    async def run(self, work: Callable[[Visit], T], tell: Callable[[Any], None] | None = None) -> T:
        """Wait for a turn and do the work in the worker's thread.

        When the task that awaits this is cancelled, a request that waits gives up its chair at once, and one that is
        worked on stops at its next :meth:`Visit.check`.

        Args:
            work: called with its visit.
            tell: called in this event loop with the work's news.

        Raises:
            Busy: no chair is free.
        """
        if not self._places.acquire(blocking=False):
            raise Busy(f"The server is busy: {self.limits.waiting} requests are waiting. Try again in a moment.")
        self._count(1)
        loop = asyncio.get_running_loop()

        def tell_here(value: Any) -> None:
            if tell is not None:
                loop.call_soon_threadsafe(tell, value)

        visit = Visit(self.limits.seconds, tell_here)
        job = self._worker.submit(visit.begin, work)
        job.add_done_callback(lambda _: self._over())
        try:
            return await asyncio.wrap_future(job)
        finally:
            visit.leave()

    def _over(self) -> None:
        self._count(-1)
        self._places.release()

    def _count(self, change: int) -> None:
        with self._lock:
            self._inside += change

    def close(self) -> None:
        """Stop taking requests; what waits is dropped."""
        self._worker.shutdown(wait=False, cancel_futures=True)
