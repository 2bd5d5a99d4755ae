"""Work that threads do ahead of its use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """``map`` with threads: the results come in order, and at most ``ahead`` of them are made before they are asked
    for. What ``function`` raises comes out here, ``items`` may have no end, and 0 ``workers`` do the work in the
    caller's thread.
    """
    rest = iter(items)
    if not workers:
        yield from map(function, rest)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="digit-data")
    try:
        pending = deque(pool.submit(function, item) for item in islice(rest, max(1, ahead)))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
