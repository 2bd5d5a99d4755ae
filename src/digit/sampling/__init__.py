"""Sampling tokens: filters, guidance, the autoregressive and the masked engine, and randomness that belongs to the
image.
"""

from digit.sampling.engine import sample
from digit.sampling.settings import SamplingSettings

__all__ = ["SamplingSettings", "sample"]
