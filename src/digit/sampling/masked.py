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
TUNED_FOR = 256
"""Tokens an image for which the literature has tuned iterations and choice temperature."""


def rounds(params: SamplingParams, tokens: int) -> int:
    """Iterations for images of so many tokens; with ``mask_scaling`` "tokens" as the side of their grid.

    A token is told by its neighbours, and each iteration carries what is known a few tokens further, so the iterations
    go with the side, sqrt(n). The published pair agrees: 8 iterations for 16 x 16 tokens, 15 for 32 x 32 (Besnier &
    Chen 2023, arXiv 2310.14400). It gives 4 for 8 x 8.
    """
    if params.mask_scaling == "none":
        return params.steps
    return max(1, round(params.steps * math.sqrt(tokens / TUNED_FOR)))


def choice_temperature(params: SamplingParams, tokens: int) -> float:
    """The choice temperature for images of so many tokens; with ``mask_scaling`` "tokens" as n^(1/3).

    The exponent is that of the same published pair, 4.5 for 16 x 16 tokens and 7 for 32 x 32: log(7 / 4.5) / log(4) =
    0.32. It gives 2.8 for 8 x 8.
    """
    if params.mask_scaling == "none":
        return params.choice_temperature
    return params.choice_temperature * math.pow(tokens / TUNED_FOR, 1 / 3)


def masked_after(
    schedule: str, steps: int, step: int, total: Int[Tensor, " B"], masked: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """How many tokens stay masked after an iteration.

    Args:
        schedule: see :class:`SamplingParams`.
        steps: iterations in all.
        step: 0-based iteration; after the last one it is 0.
        total: tokens that were masked at the start.
        masked: tokens masked before this iteration.
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
    of which to keep. For the arguments see :func:`digit.sampling.sampler.sample`.
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
        noise = choice_temperature(params, length) * (1 - (step + 1) / steps)
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
