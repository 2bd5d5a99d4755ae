"""Sampling tokens: what is asked for, filters and guidance, the autoregressive and the masked way, and randomness that
belongs to the image.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from digit.sampling.request import SampleRequest, SamplingParams
    from digit.sampling.sampler import sample

__all__ = ["SampleRequest", "SamplingParams", "sample"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the command line reads the request's fields without waiting for torch."""
    if name == "SamplingSettings":
        warnings.warn("SamplingSettings is now called SamplingParams.", DeprecationWarning, stacklevel=2)
        name = "SamplingParams"
    if name not in __all__:
        raise AttributeError(f"module 'digit.sampling' has no attribute '{name}'")
    place = "digit.sampling.sampler" if name == "sample" else "digit.sampling.request"
    return getattr(importlib.import_module(place), name)
