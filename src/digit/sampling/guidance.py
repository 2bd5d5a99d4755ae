"""Classifier-free guidance: how strong at which point of the sequence, and the combination of the two predictions.

Sources: [0] Ho & Salimans 2022, arXiv 2207.12598. Schedules that start without guidance: [1] Chang et al. 2023, arXiv
    2301.00704
(linear), [2] Gao et al. 2023, arXiv 2303.14389 (power-cosine). Interval: [3] Kynkäänniemi et al. 2024, arXiv
2404.07724.
"""

from __future__ import annotations

import math

from torch import Tensor

from digit.sampling.request import SamplingParams


def scales(settings: SamplingParams, count: int) -> list[float]:
    """The guidance scale at each of ``count`` tokens or steps; exactly 1.0 where the unguided half need not be
    computed.
    """
    return [_scale(settings, index / max(1, count - 1), index / count) for index in range(count)]


def _scale(settings: SamplingParams, progress: float, fraction: float) -> float:
    """``progress`` runs from 0 to 1 inclusive and shapes the growth; ``fraction`` in [0, 1) is compared with the
    interval.
    """
    low, high = settings.cfg_interval
    if settings.cfg_scale == 1 or not low <= fraction < high:
        return 1.0
    growth = {
        "constant": 1.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "power-cosine": (1 - math.cos(math.pi * progress**settings.cfg_power)) / 2,
    }[settings.cfg_schedule]
    return 1 + (settings.cfg_scale - 1) * growth


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Move the conditional logits away from the unconditional ones: u + scale * (c - u), in float32."""
    u = unconditional.float()
    return u + scale * (conditional.float() - u)
