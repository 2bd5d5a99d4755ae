"""From logits and one uniform number to a token: guidance, temperature, top-k, top-p, and the draw.

Nothing here waits for the device, and the vocabulary is never sorted: top-k selects, and top-p searches for its
threshold. As in the authors' code (fairseq 0.12.2), top-p keeps the tokens before the threshold and the one that
crosses it.

Sources: Fan et al. 2018, arXiv 1805.04833 (top-k); Holtzman et al. 2020, arXiv 1904.09751 (top-p); Ho & Salimans 2022,
arXiv 2207.12598 (guidance). Schedules that start without guidance: Chang et al. 2023, arXiv 2301.00704 (linear), Gao et
al. 2023, arXiv 2303.14389 (power-cosine). Interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from digit.sampling.request import SamplingParams


class DrawParams(NamedTuple):
    """The part of :class:`SamplingParams` that the draw reads; tensors () float32, so that one compiled step serves
    every value, or the numbers 0 (temperature: the most likely token) and 1 (top-p: all).
    """

    temperature: Tensor | float
    top_k: int
    top_p: Tensor | float


def scales(params: SamplingParams, count: int) -> list[float]:
    """The guidance scale at each of ``count`` tokens or steps; exactly 1.0 where the unguided half need not be
    computed.
    """
    found = [1.0] * count
    low, high = params.cfg_interval
    for index in range(count):
        if params.cfg_scale != 1 and low <= index / count < high:
            progress = index / max(1, count - 1)
            growth = {
                "constant": 1.0,
                "linear": progress,
                "cosine": (1 - math.cos(math.pi * progress)) / 2,
                "power-cosine": (1 - math.cos(math.pi * progress**params.cfg_power)) / 2,
            }[params.cfg_schedule]
            found[index] = 1 + (params.cfg_scale - 1) * growth
    return found


def guide(
    conditional: Float[Tensor, "*B V"], unconditional: Float[Tensor, "*B V"], scale: float | Tensor
) -> Float[Tensor, "*B V"]:
    """Move the conditional logits away from the unconditional ones: u + scale * (c - u), in float32."""
    u = unconditional.float()
    return u + scale * (conditional.float() - u)


def kept_probabilities(
    logits: Float[Tensor, "*B V"], params: SamplingParams | DrawParams
) -> tuple[Float[Tensor, "*B k"], Int[Tensor, "*B k"] | None]:
    """The filtered distribution, up to normalisation, at a temperature above 0: probabilities in float32, zero where
    top-p cut, and their token ids, most likely first; or None for ids: all of them in order.
    """
    logits = logits.float() / params.temperature
    cut = isinstance(params.top_p, Tensor) or params.top_p < 1
    if 0 < params.top_k < logits.shape[-1]:
        logits, ids = logits.topk(params.top_k)  # (..., k), sorted
        p = logits.softmax(-1)
        return (p * (p.cumsum(-1) - p < params.top_p) if cut else p), ids
    p = logits.softmax(-1)  # (..., V)
    return (_nucleus(p, params.top_p) if cut else p), None


def _nucleus(p: Tensor, top_p: Tensor | float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches ``top_p``; equal ones stay
    together.

    The set is {p >= t} for the largest t whose set reaches ``top_p``. Floats from 0 to 1 are ordered like their bits,
    so t is found exactly, bit by bit, in 30 sums: less than a sort of the vocabulary, and it fuses.
    """
    bits = p.view(torch.int32)  # (..., V), below 2 ** 30
    threshold = torch.zeros_like(bits[..., :1])  # (..., 1)
    for bit in range(29, -1, -1):
        candidate = threshold + (1 << bit)
        reached = torch.where(bits >= candidate, p, 0.0).sum(-1, keepdim=True) >= top_p
        threshold = torch.where(reached, candidate, threshold)
    return torch.where(bits >= threshold, p, 0.0)


def draw(
    logits: Float[Tensor, "*B V"], uniform: Float[Tensor, "*B"], params: SamplingParams | DrawParams
) -> Int[Tensor, "*B"]:
    """Draw a token per row by inverse transform sampling with numbers in [0, 1); no host synchronisation.

    A temperature of 0 takes the most likely token.
    """
    if not isinstance(params.temperature, Tensor) and params.temperature == 0:
        return logits.argmax(-1)
    p, ids = kept_probabilities(logits, params)
    cumulative = p.cumsum(-1)  # (..., k)
    threshold = uniform[..., None].to(cumulative) * cumulative[..., -1:]
    # u < 1 keeps the threshold below the total; rounding up to it must not step beyond the last token that has
    # probability
    places = torch.arange(p.shape[-1], device=p.device)
    last = torch.where(p > 0, places, 0).amax(-1, keepdim=True)  # (..., 1)
    choice = torch.minimum((cumulative <= threshold).sum(-1, keepdim=True), last)  # (..., 1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
