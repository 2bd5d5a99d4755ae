"""The feed-forward decoder's randomness: the pixel latents of each image, and a draw of all its VQ tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.sampling.logits import draw
from digit.sampling.request import SamplingParams
from digit.sampling.rng import uniforms


def pixel_latents(
    config: FeedForwardConfig, images: Sequence[int], seed: int = 0, temperature: float = 1.0, stage: str = "onepass"
) -> Tensor:
    """The noise (B, noise_dim), float32 on the CPU, that decides what the tokens of an image leave open.

    Args:
        config: of the decoder.
        images: (B,) numbers of the images within the run; image ``i`` of a seed has the same noise in any batch.
        seed: of the run.
        temperature: the standard deviation; 0 gives the middle of all images that the tokens allow.
        stage: noise of different stages is independent.
    """
    u = uniforms(seed, images, stage, (config.noise_dim,))
    # in float64 on the host, so that it is the same number on every machine
    normal: Tensor = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
    return (temperature * normal).float()


def sample_feedforward(
    model: FeedForwardDecoder,
    uniform: Tensor,
    noise: Tensor,
    params: SamplingParams,
    prefix: Tensor,
    labels: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """All VQ tokens (B, M) in one pass of a decoder with the head "vq", each drawn from its own logits.

    Args:
        model: the decoder.
        uniform: (B, M) numbers in [0, 1), one for each token.
        noise: (B, noise_dim).
        params: temperature, top-k and top-p of the tokens.
        prefix: (B, N) semantic tokens.
        labels: (B,) classes.
        given: (B, M) tokens; those outside ``mask`` are kept.
        mask: (B, M) bool, True where to sample; None samples everything.
    """
    tokens = draw(model(prefix, noise.to(model.start), labels), uniform, params)  # (B, M)
    return tokens if mask is None or given is None else torch.where(mask, tokens, given)


noise, sample_onepass = pixel_latents, sample_feedforward  # names of the first edition
