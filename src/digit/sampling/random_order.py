"""Random-order sampling: tokens in any order, several a step, from one KV cache.

Kept tokens come first in the order, so all others are drawn having seen them, wherever they stand: inpainting is exact
conditioning. Tokens of one step are drawn independently of one another; with as many steps as tokens none are. Row by
row (``order="raster"``), one a step, it is plain autoregressive sampling of the same network.

Source: Pang et al. 2024, arXiv 2412.01827 (RandAR), whose schedule is MaskGIT's cosine, like the default here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from digit.models.token_model import NO_LABEL, Ids, Labels, Mask, TokenModel
from digit.sampling.logits import draw, guide, scales
from digit.sampling.masked import SCHEDULES
from digit.sampling.request import Sampled, SamplingParams


def counts(params: SamplingParams, total: int) -> list[int]:
    """How many tokens each step draws, at least one: ``total`` in all."""
    steps, left, found = min(params.steps or total, total), total, []
    for step in range(steps):
        wanted = int(total * SCHEDULES[params.mask_schedule]((step + 1) / steps))  # that stay open
        stay = max(min(wanted, left - 1), steps - step - 1)
        found.append(left - stay)
        left = stay
    return found


def sample_random_order(
    model: TokenModel,
    uniform: Float[Tensor, "B 2 n"],
    params: SamplingParams,
    labels: Labels = None,
    given: Ids | None = None,
    mask: Mask = None,
    on_step: Sampled | None = None,
) -> Ids:
    """Sample with two numbers in [0, 1) a place: for the order, and for the token. For the other arguments see
    :func:`digit.sampling.sampler.sample`.

    Images with as many tokens to sample take their steps together; others have other steps, and follow.
    """
    batch, _, length = uniform.shape
    if mask is None or given is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=uniform.device)
        given = torch.zeros(batch, length, dtype=torch.long, device=uniform.device)
    tokens, mask, totals = given.masked_fill(mask, 0), mask.clone(), mask.sum(1)  # (B, n), (B, n), (B,)
    raster = torch.arange(length, device=uniform.device) / length
    rank = raster if params.order == "raster" else uniform[:, 0]
    order = (rank + mask).argsort(dim=1, stable=True)  # (B, n), kept tokens first
    for total in sorted(set(totals.tolist()) - {0}):
        rows = (totals == total).nonzero().flatten()
        labels_of_rows = None if labels is None else labels[rows]
        steps = _steps(model, uniform[rows, 1], params, labels_of_rows, tokens[rows], order[rows], total)
        for step, (places, drawn) in enumerate(steps):
            tokens[rows[:, None], places] = drawn
            mask[rows[:, None], places] = False
            if on_step is not None:
                on_step(step + 1, tokens, mask)
    return tokens


def _steps(
    model: TokenModel,
    uniform: Float[Tensor, "B n"],
    params: SamplingParams,
    labels: Labels,
    tokens: Ids,
    order: Ids,
    total: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw the last ``total`` tokens in the order; of each step the places (B, q) and their tokens (B, q).

    With guidance both halves run in every step, whatever its scale: each step is what the next is conditioned on.
    """
    amounts = counts(params, total)
    scale, halves, known, cached = scales(params, len(amounts)), 1, order.shape[1] - total, None
    if labels is not None and any(s != 1 for s in scale):
        labels, halves = torch.cat([labels, torch.full_like(labels, NO_LABEL)]), 2
    cache = model.new_cache(halves * len(tokens))
    for step, amount in enumerate(amounts):
        part = order[:, : known + amount]
        inputs = (tokens.repeat(halves, 1), part.repeat(halves, 1))
        logits = model.query(cache, *inputs, known, cached, labels)  # (B or 2 B, q, V)
        conditional, unconditional = logits.chunk(2) if halves == 2 else (logits, logits)
        logits = conditional if scale[step] == 1 else guide(conditional, unconditional, scale[step])
        places = part[:, known:]
        drawn = draw(logits, uniform.gather(1, places), params)
        tokens = tokens.scatter(1, places, drawn)
        cached, known = known, known + amount
        yield places, drawn
