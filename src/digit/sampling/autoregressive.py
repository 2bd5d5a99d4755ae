"""The autoregressive engine: one pass over what is given, then one token a step from a preallocated cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from digit.models.token_model import NO_LABEL, TokenModel
from digit.sampling.filters import draw
from digit.sampling.guidance import guide, scales
from digit.sampling.settings import SamplingSettings


def sample_autoregressive(
    model: TokenModel,
    uniform: Tensor,
    settings: SamplingSettings,
    labels: Tensor | None = None,
    prefix: Tensor | None = None,
    given: Tensor | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample sequences token by token.

    With guidance every sequence runs twice, as two halves of one batch: with its label and without.

    Args:
        model: of role "prior" or "ar".
        uniform: (B, length) numbers in [0, 1), one a token; see :mod:`digit.sampling.seeding`.
        settings: temperature, top-k, top-p and guidance.
        labels: (B,) classes.
        prefix: (B, P) semantic tokens, for decoders.
        given: (B, n) first tokens that are kept.
        on_token: called with (number of tokens known, tokens so far (B, length)) after each token.

    Returns:
        (B, length) ids.
    """
    batch, length = len(uniform), model.config.length
    known = 0 if given is None else given.shape[1]
    tokens = torch.zeros(batch, length, dtype=torch.long, device=uniform.device)
    if given is not None:
        tokens[:, :known] = given
    if known == length:
        return tokens
    scale = scales(settings, length)
    guided = any(s != 1 for s in scale[known:])
    if guided:
        labels, prefix, given = _double(labels, prefix, given)
    cache = model.new_cache(2 * batch if guided else batch)
    logits = model.prefill(cache, 2 * batch if guided else batch, labels, prefix, given)  # (B or 2B, V)
    for index in range(known, length):
        if guided:
            logits = guide(logits[:batch], logits[batch:], scale[index])  # (B, V)
        tokens[:, index] = draw(logits, uniform[:, index], settings)
        if on_token is not None:
            on_token(index + 1, tokens)
        if index + 1 < length:
            token = tokens[:, index]
            token = torch.cat([token, token]) if guided else token
            logits = model.step(cache, token, torch.tensor(index, device=uniform.device))
    return tokens


def _double(*parts: Tensor | None) -> tuple[Tensor | None, ...]:
    """Stack the guided half over the unguided one: the same prefix and tokens, and no label."""
    labels, *rest = parts
    assert labels is not None  # engine.sample refuses guidance without labels
    return torch.cat([labels, torch.full_like(labels, NO_LABEL)]), *(None if p is None else torch.cat([p, p]) for p in rest)
