"""Masked sampling: all tokens at once, the most confident ones kept, the others drawn again; a few iterations.

Source: Chang et al. 2022, arXiv 2202.04200 (MaskGIT), in the arithmetic of the authors' decoder (DAMO-NLP-SG/DiGIT at
cd6d8ca): after iteration t of S the floor(n * schedule((t + 1) / S)) least confident of the n tokens stay masked, at
least one fewer than before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from digit.models.token_model import NO_LABEL, Ids, Labels, Mask, Prefix, TokenModel
from digit.sampling.logits import draw, guide, scales
from digit.sampling.request import Sampled, SamplingParams

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi * r / 2),
    "linear": lambda r: 1 - r,
    "sqrt": lambda r: 1 - math.sqrt(r),
}


def masked_after(
    schedule: str, steps: int, step: int, total: Int[Tensor, " B"], masked: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """How many tokens stay masked after iteration ``step`` of ``steps``, counted from 0: none after the last; ``total``
    were masked at the start, and ``masked`` before this iteration.
    """
    if step + 1 == steps:
        return torch.zeros_like(masked)
    wanted = (total.double() * SCHEDULES[schedule]((step + 1) / steps)).floor().long()
    return torch.minimum(wanted, masked - 1).clamp(min=1).minimum(masked)


def sample_masked(
    model: TokenModel,
    uniform: Float[Tensor, "B steps 2 n"],
    params: SamplingParams,
    labels: Labels = None,
    prefix: Prefix = None,
    given: Ids | None = None,
    mask: Mask = None,
    on_step: Sampled | None = None,
) -> Ids:
    """Fill masked tokens in as many iterations as there are numbers in [0, 1) for: for the tokens, and for the choice
    of which to keep.

    ``params`` have their choice temperature, as :meth:`~digit.sampling.request.SamplingParams.of` fills it in. For the
    other arguments see :func:`digit.sampling.sampler.sample`.
    """
    batch, steps, _, length = uniform.shape
    if mask is None or given is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=uniform.device)
        given = torch.zeros(batch, length, dtype=torch.long, device=uniform.device)
    tokens, total = given.masked_fill(mask, 0), mask.sum(1)  # (B, length), (B,)
    for step, scale in enumerate(scales(params, steps)):
        logits = _predict(model, tokens, labels, prefix, mask, scale)  # (B, length, V)
        drawn = draw(logits, uniform[:, step, 0], params)  # (B, length)
        tokens = torch.where(mask, drawn, tokens)
        stay = masked_after(params.mask_schedule, steps, step, total, mask.sum(1))  # (B,)
        log_p = logits.float().log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)  # (B, length)
        noise = (params.choice_temperature or 0.0) * (1 - (step + 1) / steps)
        gumbel = -torch.log(-torch.log(uniform[:, step, 1].clamp(min=1e-20, max=1 - 1e-7)))  # (B, length)
        # a kept token is never masked again
        confidence = (log_p + noise * gumbel).masked_fill(~mask, math.inf)
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
