"""How many pictures at a time: as many as memory holds, found by measuring; and what to do when that was too many."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from digit.core.errors import DigitError

log = logging.getLogger("digit")

PROBE = 8
"""Pictures in the batch that is measured."""
LIMITS = {"cpu": 64, "cuda": 256}
"""Beyond these a larger batch is no faster (see docs/performance.md)."""
SHARE = 0.8
"""Of the free memory; the rest is for others and for fragments."""


class Batcher:
    """Cuts a list of images into batches.

    The first batch has :data:`PROBE` images, and the memory it took decides the size of the others; or the size is
    given. When a batch does not fit after all, it is halved and tried again.

    Args:
        device: where the pictures are made.
        size: how many at a time, or None to measure.
        release: called after a batch did not fit, to free what is kept between batches.
    """

    def __init__(self, device: torch.device, size: int | None, release: Callable[[], None]) -> None:
        self.device, self.size, self._release = device, size, release

    def run(self, images: Sequence[int], work: Callable[[Sequence[int]], None]) -> Iterator[int]:
        """Call ``work`` on batch after batch; yields how many pictures each had."""
        start = 0
        while start < len(images):
            part = images[start : start + (self.size or PROBE)]
            try:
                if self.size is None and len(images) > PROBE:
                    self.size = self._measured(work, part)
                else:
                    work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(part))
                continue
            yield len(part)
            start += len(part)

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise DigitError(
                f"Not even one picture at a time fits into the memory of {self.device}. Use a smaller model, --dtype bf16, or "
                "another --device."
            ) from None
        self.size = tried // 2
        log.warning("A batch of %d pictures does not fit into memory; going on with %d at a time.", tried, self.size)
        self._release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measured(self, work: Callable[[Sequence[int]], None], images: Sequence[int]) -> int:
        """Do the first batch, and say how many pictures fit into a batch."""
        before = allocated(self.device)
        reset_peak(self.device)
        work(images)
        each = (peak(self.device) - before) // len(images)
        limit = LIMITS.get(self.device.type, 64)
        room = available(self.device)
        fitting = int(SHARE * room / max(1, each)) if room else limit
        return max(PROBE, min(limit, fitting // PROBE * PROBE))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "not enough memory" in text
        or "allocate memory" in text
    )


def allocated(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or peak(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of :func:`peak`, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak is that of the whole process: too high, which is safe
        return


def peak(device: torch.device) -> int:
    """The most bytes in use since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available(device: torch.device) -> int:
    """Bytes that can still be had; 0 where nobody knows."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _status(field: str) -> int:
    """A number of bytes from Linux's report on this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
