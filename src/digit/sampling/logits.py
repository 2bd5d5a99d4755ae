"""From logits and one uniform number to a token: temperature, top-k, top-p, and the draw.

Nothing here waits for the device, and the vocabulary is never sorted: top-k selects, and top-p searches for its
    threshold.

Sources: [0] Fan et al. 2018, arXiv 1805.04833 (top-k). [1] Holtzman et al. 2020, arXiv 1904.09751 (top-p). As in the
    authors' code
(fairseq 0.12.2), top-p keeps the tokens before the threshold and the one that crosses it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from digit.sampling.request import SamplingParams


class Knobs(NamedTuple):
    """The part of the settings that the draw reads; tensors, so that one compiled step serves every value.

    Attributes:
        temperature: () float32, or the number 0 for the most likely token.
        top_k: 0 keeps all.
        top_p: () float32, or the number 1 to keep all.
    """

    temperature: Tensor | float
    top_k: int
    top_p: Tensor | float


def kept_probabilities(logits: Tensor, settings: SamplingParams | Knobs) -> tuple[Tensor, Tensor | None]:
    """The filtered distribution, up to normalisation.

    Args:
        logits: (..., V).
        settings: temperature > 0, top_k, top_p.

    Returns:
        Probabilities (..., k) float32, zero where top-p cut, and their token ids (..., k), most likely first; or (...,
        V) and None: in order of ids.
    """
    logits = logits.float() / settings.temperature
    cut = isinstance(settings.top_p, Tensor) or settings.top_p < 1
    if 0 < settings.top_k < logits.shape[-1]:
        logits, ids = logits.topk(settings.top_k)  # (..., k), sorted
        p = logits.softmax(-1)
        return (p * (p.cumsum(-1) - p < settings.top_p) if cut else p), ids
    p = logits.softmax(-1)  # (..., V)
    return (_nucleus(p, settings.top_p) if cut else p), None


def _nucleus(p: Tensor, top_p: Tensor | float) -> Tensor:
    """Zero all but the smallest set of most likely tokens whose probability reaches ``top_p``; equal ones stay
    together.

    The set is {p >= t} for the largest t whose set reaches ``top_p``. Floats from 0 to 1 are ordered like their bits,
    so t is found
    exactly, bit by bit, in 30 sums: less than a sort of the vocabulary, and it fuses.
    """
    bits = p.view(torch.int32)  # (..., V), below 2 ** 30
    threshold = torch.zeros_like(bits[..., :1])  # (..., 1)
    for bit in range(29, -1, -1):
        candidate = threshold + (1 << bit)
        reached = torch.where(bits >= candidate, p, 0.0).sum(-1, keepdim=True) >= top_p
        threshold = torch.where(reached, candidate, threshold)
    return torch.where(bits >= threshold, p, 0.0)


def draw(logits: Tensor, uniform: Tensor, settings: SamplingParams | Knobs) -> Tensor:
    """Draw a token per row by inverse transform sampling; no host synchronisation.

    Args:
        logits: (..., V).
        uniform: (...) numbers in [0, 1).
        settings: a temperature of 0 takes the most likely token.

    Returns:
        (...) int64 ids.
    """
    if not isinstance(settings.temperature, Tensor) and settings.temperature == 0:
        return logits.argmax(-1)
    p, ids = kept_probabilities(logits, settings)
    cumulative = p.cumsum(-1)  # (..., k)
    threshold = uniform[..., None].to(cumulative) * cumulative[..., -1:]
    # u < 1 keeps the threshold below the total; rounding up to it must not step beyond the last token that has
    # probability
    places = torch.arange(p.shape[-1], device=p.device)
    last = torch.where(p > 0, places, 0).amax(-1, keepdim=True)  # (..., 1)
    choice = torch.minimum((cumulative <= threshold).sum(-1, keepdim=True), last)  # (..., 1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
