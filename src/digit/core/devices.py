"""Devices and number formats, by the names a user types."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

from digit.core.errors import DigitError

DTYPES = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    **{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
}


def pick_device(name: str | None) -> torch.device:
    """The device asked for; with None or "auto" the best there is. A DigitError where there is no such device."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise DigitError(f"The device '{name}' cannot be used here ({reason}). Use --device cpu.") from error
    return device


def pick_dtype(name: str) -> torch.dtype:
    """A number format by its name in torch, or fp32, bf16, fp16; a DigitError for another name."""
    if name not in DTYPES:
        raise DigitError(f"--dtype {name} was given; expected one of: {', '.join(DTYPES)}.")
    return DTYPES[name]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 is quicker than float32 there. A CPU with instructions for it is tried once, for a few
    milliseconds: an Intel Xeon without AMX has them and multiplies half as fast with them, an AMD EPYC twice as fast.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private names, which may go
    held_back = torch.backends.cpu.get_cpu_capability() == "AVX2"  # as ATEN_CPU_CAPABILITY does
    if device.type != "cpu" or held_back or not any(getattr(torch.cpu, probe, bool)() for probe in probes):
        return False
    return measured_flops(device, torch.bfloat16) > measured_flops(device, torch.float32)


@cache
def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a few square matrix products, on as many threads as torch has now."""
    size = 512 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):  # the first is slow
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def quick_pixels(device: torch.device) -> AbstractContextManager[Any]:
    """For networks that make pixels: bfloat16 where a CPU is quicker with it, as in their training; float32 elsewhere.

    An image moves by less than a grey level of 256 (measured: 0.3 on average, 2 at most) and takes half the time.
    """
    if device.type == "cpu" and bf16_is_fast(device):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()
