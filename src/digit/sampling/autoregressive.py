"""Autoregressive sampling: one pass over what is given, then one token a step from a preallocated cache."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from digit.models.token_model import Ids, Labels, Mask, Prefix, TokenModel
from digit.sampling.engines.acceleration import engine_cache
from digit.sampling.logits import scales
from digit.sampling.request import Sampled, SamplingParams


def sample_autoregressive(
    model: TokenModel,
    uniform: Float[Tensor, "B n"],
    params: SamplingParams,
    labels: Labels = None,
    prefix: Prefix = None,
    given: Int[Tensor, "B k"] | None = None,
    mask: Mask = None,
    on_token: Sampled | None = None,
) -> Ids:
    """Sample sequences token by token with one number in [0, 1) each; for the arguments see
    :func:`digit.sampling.sampler.sample`.

    With guidance a sequence runs twice, with its label and without, as two halves of one batch; only where the scale is
    not 1. Kept tokens inside ``mask`` are forced when their turn comes: what is drawn before them has not seen them.
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
    scale = scales(params, length)
    cache = engine_cache(model)
    with cache.lock:
        engine = cache.engine_for(model, batch, any(s != 1 for s in scale[known:]))
        draw = engine.begin(uniform, tokens, free, scale, params)
        # some engines have a fixed size: the last row is repeated
        rows = torch.arange(engine.batch, device=uniform.device).clamp(max=batch - 1)
        labels, prefix = (part if part is None else part[rows] for part in (labels, prefix))
        guided = scale[known] != 1
        engine.prefill(model, known, labels, prefix, draw, guided)
        index = known + 1
        if on_token is not None:
            on_token(index, engine.state.tokens[:batch])
        while index < length:
            if scale[index] != 1 and not guided:
                engine.catch_up(model, index - 1, prefix)
            guided, start = scale[index] != 1, index
            index += 1
            while on_token is None and index < length and (scale[index] != 1) == guided:
                index += 1
            engine.decode_tokens(model, start, index, guided, draw)
            if on_token is not None:
                on_token(index, engine.state.tokens[:batch])
        return engine.state.tokens[:batch].clone()
