"""The autoregressive engine: one pass over what is given, then one token a step from a preallocated cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from digit.models.token_model import TokenModel
from digit.sampling.engines.acceleration import workshop
from digit.sampling.guidance import scales
from digit.sampling.request import SamplingParams


def sample_autoregressive(
    model: TokenModel,
    uniform: Tensor,
    settings: SamplingParams,
    labels: Tensor | None = None,
    prefix: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample sequences token by token.

    With guidance a sequence runs twice, with its label and without, as two halves of one batch; only where the scale is
    not 1. Kept tokens inside ``mask`` are forced when their turn comes: what is drawn before them has not seen them.

    Args:
        model: of role "prior" or "ar".
        uniform: (B, length) numbers in [0, 1), one a token; see :mod:`digit.sampling.rng`.
        settings: temperature, top-k, top-p and guidance.
        labels: (B,) classes.
        prefix: (B, P) semantic tokens, for decoders.
        given: tokens to keep: (B, n) first ones, or (B, length) with ``mask``.
        mask: (B, length) bool, True where to sample.
        on_token: called with (number of tokens known, tokens so far (B, length)) after each token.

    Returns:
        (B, length) ids.
    """
    batch, length = uniform.shape
    tokens = torch.zeros(batch, length, dtype=torch.long, device=uniform.device)
    free = torch.ones(batch, length, dtype=torch.bool, device=uniform.device)
    if given is not None:
        tokens[:, : given.shape[1]] = given
        free[:, : given.shape[1]] = False if mask is None else mask
    known = int(free.any(0).long().argmax()) if bool(free.any()) else length
    if known == length:
        return tokens
    scale = scales(settings, length)
    with workshop(model).lock:
        stepper = workshop(model).stepper_for(model, batch, any(s != 1 for s in scale[known:]))
        knobs = stepper.begin(uniform, tokens, free, scale, settings)
        labels, prefix = (_pad(part, stepper.batch) for part in (labels, prefix))
        guided = scale[known] != 1
        stepper.start(model, known, labels, prefix, knobs, guided)
        for index in range(known, length):
            if index > known:
                if scale[index] != 1 and not guided:
                    stepper.catch_up(model, index - 1, prefix)
                guided = scale[index] != 1
                stepper.step(model, index, knobs, guided)
            if on_token is not None:
                on_token(index + 1, stepper.state.tokens[:batch])
        return stepper.state.tokens[:batch].clone()


def _pad(part: Tensor | None, batch: int) -> Tensor | None:
    """Repeat the last row until there are ``batch``: a compiled step has a fixed size."""
    if part is None or len(part) == batch:
        return part
    return torch.cat([part, part[-1:].expand(batch - len(part), *part.shape[1:])])
