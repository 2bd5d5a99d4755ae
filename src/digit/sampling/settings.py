"""The first edition's place of :class:`~digit.sampling.request.SamplingParams`."""

from digit.sampling.request import SamplingParams as SamplingSettings

__all__ = ["SamplingSettings"]
