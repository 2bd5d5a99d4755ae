"""One entrance to sampling tokens: makes each image's random numbers and samples as the model's role needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from digit.models.feedforward import FeedForwardDecoder
from digit.models.token_model import Ids, Labels, Mask, Prefix, TokenModel
from digit.sampling.autoregressive import sample_autoregressive
from digit.sampling.logits import draw
from digit.sampling.masked import sample_masked
from digit.sampling.random_order import counts, sample_random_order
from digit.sampling.request import Sampled, SamplingParams, check_model, takes_steps
from digit.sampling.rng import Seeds, pixel_latents, uniforms


@torch.inference_mode()
def sample(
    model: TokenModel | FeedForwardDecoder,
    images: Sequence[int],
    seed: Seeds = 0,
    params: SamplingParams | None = None,
    labels: Labels = None,
    prefix: Prefix = None,
    given: Ids | None = None,
    mask: Mask = None,
    callback: Sampled | None = None,
    stage: str | None = None,
) -> Ids:
    """Sample the tokens of some images of a run.

    Args:
        model: its role decides how; a feed-forward decoder has the head "vq".
        images: (B,) numbers of the images within the run; with ``seed`` they determine the random numbers.
        seed: of the run, or one for each image.
        params: how to sample.
        labels, prefix: see :mod:`digit.models.token_model`.
        given: tokens to keep: (B, length) with ``mask``; or (B, n) first tokens.
        mask: True where to sample.
        callback: told after every token or step.
        stage: whose random numbers are used, see :func:`digit.sampling.rng.uniforms`; by default the model's role.

    Returns:
        (B, length) int64 ids on the model's device.

    Raises:
        DigitError: labels out of range, guidance that the model was not trained for.
    """
    config, device = model.config, model.start.device
    params = (params or SamplingParams()).of(config.role, config.length)
    check_model(config, params, labels)
    labels, prefix, given, mask = (None if t is None else t.to(device) for t in (labels, prefix, given, mask))
    if isinstance(model, FeedForwardDecoder):  # all tokens in one pass, each drawn from its own logits
        noise = pixel_latents(model.config, images, seed).to(model.start)
        uniform = uniforms(seed, images, "onepass-tokens", (config.length,)).to(device)
        tokens = draw(model(prefix, noise, labels), uniform, params)  # (B, M)
        tokens = tokens if mask is None or given is None else torch.where(mask, tokens, given)
        if callback is not None:
            callback(config.length, tokens)
        return tokens
    stage, n = stage or config.role, config.length
    if takes_steps(config) and given is not None and mask is None:
        mask = (torch.arange(n, device=device) >= given.shape[1]).expand(len(given), -1)
        given = F.pad(given, (0, n - given.shape[1]))
    if config.role == "masked":
        uniform = uniforms(seed, images, stage, (params.steps or n, 2, n)).to(device)
        return sample_masked(model, uniform, params, labels, prefix, given, mask, callback)
    if config.role == "random":
        uniform = uniforms(seed, images, stage, (2, n)).to(device)
        return sample_random_order(model, uniform, params, labels, given, mask, callback)
    uniform = uniforms(seed, images, stage, (n,)).to(device)
    return sample_autoregressive(model, uniform, params, labels, prefix, given, mask, callback)


def calls(config: Any, params: SamplingParams) -> int:
    """The number that the last call of a callback tells: tokens an image, or steps for whole images."""
    params = params.of(config.role, config.length)
    if config.role == "random":
        return len(counts(params, config.length))
    return int(params.steps or config.length) if config.role == "masked" else int(config.length)
