"""How many images at a time: as many as memory holds, found by measuring; and what to do when that was too many.

``accelerate.utils.find_executable_batch_size`` only halves after a failure; on a CPU the system ends the process
instead of failing, so the first batch is measured here.
"""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from digit.core.errors import DigitError

log = logging.getLogger("digit")

PROBE = 8
"""Images in the batch that is measured."""
LIMITS = {"cpu": 64, "cuda": 256}
"""Beyond these a larger batch is no faster (see docs/performance.md)."""
SHARE = 0.8
"""Of the free memory; the rest is for others and for fragments."""


def decoded_at_once(side: int) -> int:
    """Images of ``side`` pixels that are decoded together, however many are sampled: 64 of 32 pixels, 8 from 91 on.

    Networks that make small images need as many to be quick.
    """
    return min(64, max(8, 65536 // side**2))


class Batcher:
    """Cuts a list of images into batches of a size, or of None: the first has :data:`PROBE` images, and the memory it
    took on the device decides the size of the others. When a batch does not fit after all, ``release`` frees what is
    kept between batches, and the batch is halved and tried again.
    """

    def __init__(self, device: torch.device, size: int | None, release: Callable[[], None]) -> None:
        self.device, self.size, self._release = device, size, release

    def run(self, images: Sequence[int], work: Callable[[Sequence[int]], None]) -> Iterator[int]:
        """Call ``work`` on batch after batch; yields how many images each had."""
        start = 0
        while start < len(images):
            part = images[start : start + (self.size or PROBE)]
            measure = self.size is None and len(images) > PROBE
            try:
                before = begin(self.device) if measure else 0
                work(part)
                if measure:
                    each = max(1, (peak(self.device) - before) // len(part))  # bytes
                    limit, room = LIMITS.get(self.device.type, 64), available(self.device)
                    fitting = int(SHARE * room / each) if room else limit
                    self.size = max(PROBE, min(limit, fitting // PROBE * PROBE))
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
                f"Not even one image at a time fits into the memory of {self.device}. Use a smaller model, --dtype "
                "bf16, or another --device."
            ) from None
        self.size = tried // 2
        log.warning("A batch of %d images does not fit into memory; going on with %d at a time.", tried, self.size)
        self._release()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "not enough memory" in str(error) or "allocate memory" in str(error)


def begin(device: torch.device) -> int:
    """Bytes in use now; a new measurement of :func:`peak` begins, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # elsewhere than on Linux the peak is that of the whole process: too high, which is safe
        Path("/proc/self/clear_refs").write_text("5")
    return _kernel("self/status", "VmRSS") or peak(device)


def peak(device: torch.device) -> int:
    """The most bytes in use since :func:`begin`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kernel("self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available(device: torch.device) -> int:
    """Bytes that can still be had; 0 where nobody knows."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kernel("meminfo", "MemAvailable")


def _kernel(report: str, field: str) -> int:
    """A number of bytes from Linux's reports on this process or on its memory; 0 elsewhere."""
    with suppress(OSError):
        for line in Path("/proc", report).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0
