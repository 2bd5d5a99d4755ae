"""The masked engine: all tokens at once, the most confident ones kept, the others drawn again; a few iterations.

Source: [0] Chang et al. 2022, arXiv 2202.04200 (MaskGIT), in the arithmetic of the authors' decoder (DAMO-NLP-SG/DiGIT
    at cd6d8ca): after
iteration t of S the floor(n * schedule((t + 1) / S)) least confident of the n tokens stay masked, at least one fewer
than before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from digit.models.token_model import NO_LABEL, TokenModel
from digit.sampling.guidance import guide, scales
from digit.sampling.logits import draw
from digit.sampling.request import SamplingParams

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
    "sqrt": lambda r: 1 - math.sqrt(r),
}


def masked_after(settings: SamplingParams, step: int, total: Tensor, masked: Tensor) -> Tensor:
    """How many tokens stay masked after an iteration.

    Args:
        settings: steps and schedule.
        step: 0-based iteration; after the last one it is 0.
        total: (B,) tokens that were masked at the start.
        masked: (B,) tokens masked before this iteration.
    """
    if step + 1 == settings.steps:
        return torch.zeros_like(masked)
    share = _SCHEDULES[settings.mask_schedule]((step + 1) / settings.steps)
    wanted = (total.double() * share).floor().long()
    return torch.minimum(wanted, masked - 1).clamp(min=1).minimum(masked)


def sample_masked(
    model: TokenModel,
    uniform: Tensor,
    settings: SamplingParams,
    labels: Tensor | None = None,
    prefix: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Fill masked tokens in ``settings.steps`` iterations.

    Args:
        model: of role "masked".
        uniform: (B, steps, 2, length) numbers in [0, 1): for the tokens, and for the choice of which to keep.
        settings: steps, schedule, choice temperature, temperature, top-k, top-p and guidance.
        labels: (B,) classes.
        prefix: (B, P) semantic tokens, for decoders.
        given: (B, length) tokens; those outside ``mask`` are kept.
        mask: (B, length) bool, True where to sample; None samples everything.
        on_step: called with (iterations done, tokens (B, length), mask (B, length)) after each iteration.

    Returns:
        (B, length) ids.
    """
    batch, length = len(uniform), model.config.length
    if mask is None or given is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=uniform.device)
        given = torch.zeros(batch, length, dtype=torch.long, device=uniform.device)
    tokens, total = given.masked_fill(mask, 0), mask.sum(1)  # (B, length), (B,)
    for step, scale in enumerate(scales(settings, settings.steps)):
        logits = _predict(model, tokens, labels, prefix, mask, scale)  # (B, length, V)
        drawn = draw(logits, uniform[:, step, 0], settings)  # (B, length)
        tokens = torch.where(mask, drawn, tokens)
        stay = masked_after(settings, step, total, mask.sum(1))  # (B,)
        log_p = logits.float().log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)  # (B, length)
        noise = settings.choice_temperature * (1 - (step + 1) / settings.steps)
        confidence = log_p + noise * _gumbel(uniform[:, step, 1])
        confidence = confidence.masked_fill(~mask, math.inf)  # a kept token is never masked again
        rank = confidence.argsort(dim=1, stable=True).argsort(dim=1)  # (B, length), 0 for the least confident
        mask = rank < stay[:, None]
        if on_step is not None:
            on_step(step + 1, tokens, mask)
    return tokens


def _predict(
    model: TokenModel, tokens: Tensor, labels: Tensor | None, prefix: Tensor | None, mask: Tensor, scale: float
) -> Tensor:
    """Logits (B, length, V), guided where the scale is not 1."""
    if scale == 1 or labels is None:
        return model(tokens, labels, prefix, mask)  # type: ignore[no-any-return]
    both = torch.cat([labels, torch.full_like(labels, NO_LABEL)])  # (2B,)
    pair = None if prefix is None else torch.cat([prefix, prefix])
    conditional, unconditional = model(torch.cat([tokens, tokens]), both, pair, torch.cat([mask, mask])).chunk(2)
    return guide(conditional, unconditional, scale)


def _gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from numbers in [0, 1)."""
    return -torch.log(-torch.log(uniform.clamp(min=1e-20, max=1 - 1e-7)))
