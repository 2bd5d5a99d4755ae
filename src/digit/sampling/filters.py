"""From logits and one uniform number to a token: temperature, top-k, top-p, and the draw.

Sources: [0] Fan et al. 2018, arXiv 1805.04833 (top-k). [1] Holtzman et al. 2020, arXiv 1904.09751 (top-p). As in the authors' code
(fairseq 0.12.2), top-p keeps the tokens before the threshold and the one that crosses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from digit.sampling.settings import SamplingSettings


def kept_probabilities(logits: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor | None]:
    """The filtered distribution, up to normalisation, most likely first where that was needed.

    Args:
        logits: (..., V).
        settings: temperature > 0, top_k, top_p.

    Returns:
        Probabilities (..., k) float32, zero where top-p cut, and their token ids (..., k), or None when k = V in order of ids.
    """
    logits = logits.float() / settings.temperature
    ids: Tensor | None = None
    if 0 < settings.top_k < logits.shape[-1]:
        logits, ids = logits.topk(settings.top_k)  # (..., k), sorted: no sort of the whole vocabulary
    elif settings.top_p < 1:
        logits, ids = logits.sort(descending=True)  # (..., V)
    p = logits.softmax(-1)
    if settings.top_p < 1:
        p = p * (p.cumsum(-1) - p < settings.top_p)
    return p, ids


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> Tensor:
    """Draw a token per row by inverse transform sampling; no host synchronisation.

    Args:
        logits: (..., V).
        uniform: (...) numbers in [0, 1).
        settings: a temperature of 0 takes the most likely token.

    Returns:
        (...) int64 ids.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    p, ids = kept_probabilities(logits, settings)
    cumulative = p.cumsum(-1)  # (..., k)
    threshold = uniform[..., None].to(cumulative) * cumulative[..., -1:]
    # u < 1 keeps the threshold below the total; rounding up to it must not step beyond the last token that has probability
    last = (p > 0).to(torch.long).cumsum(-1).argmax(-1, keepdim=True)  # (..., 1)
    choice = torch.minimum((cumulative <= threshold).sum(-1, keepdim=True), last)  # (..., 1)
    return (choice if ids is None else ids.gather(-1, choice)).squeeze(-1)
