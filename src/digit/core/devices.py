"""Devices and number formats, by the names a user types."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from digit.core.environment import processor_name
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
    """Whether bfloat16 is quicker than float32 there: where a GPU or AMX has it, or the AVX-512 of an AMD processor.
    An Intel one without AMX has such instructions too, and multiplies half as fast with them.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX2":  # as ATEN_CPU_CAPABILITY does
        return False
    # private names, which may go
    amx, avx512 = (getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return amx or (avx512 and "Intel" not in processor_name())


def quick_pixels(device: torch.device) -> AbstractContextManager[Any]:
    """For networks that make pixels: bfloat16 where a CPU is quicker with it, as in their training; float32 elsewhere.

    An image moves by less than a grey level of 256 (measured: 0.3 on average, 2 at most) and takes half the time.
    """
    if device.type == "cpu" and bf16_is_fast(device):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()
