"""The one-pass engine: the noise of each image, and a single pass of the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from digit.models.feedforward import OnePassConfig, OnePassDecoder
from digit.sampling.logits import draw
from digit.sampling.rng import uniforms
from digit.sampling.settings import SamplingSettings


def noise(
    config: OnePassConfig, images: Sequence[int], seed: int = 0, temperature: float = 1.0, stage: str = "onepass"
) -> Tensor:
    """The noise of some images of a run.

    Args:
        config: of the decoder.
        images: (B,) numbers of the images within the run; picture ``i`` of a seed has the same noise in any batch.
        seed: of the run.
        temperature: the noise's standard deviation; 0 gives the middle of all pictures that the tokens allow.
        stage: noise of different stages is independent.

    Returns:
        (B, noise_dim) float32 on the CPU.
    """
    u = uniforms(seed, images, stage, (config.noise_dim,))
    # in float64 on the host, so that it is the same number on every machine
    normal: Tensor = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
    return (temperature * normal).float()


def sample_onepass(
    model: OnePassDecoder,
    uniform: Tensor,
    noise: Tensor,
    settings: SamplingSettings,
    prefix: Tensor,
    labels: Tensor | None = None,
    given: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """All VQ tokens in one pass, each drawn from its own logits.

    Args:
        model: with the head "vq".
        uniform: (B, M) numbers in [0, 1), one for each token.
        noise: (B, noise_dim).
        settings: temperature, top-k and top-p of the tokens.
        prefix: (B, N) semantic tokens.
        labels: (B,) classes.
        given: (B, M) tokens; those outside ``mask`` are kept.
        mask: (B, M) bool, True where to sample; None samples everything.

    Returns:
        (B, M) ids.
    """
    tokens = draw(model(prefix, noise.to(model.start), labels), uniform, settings)  # (B, M)
    return tokens if mask is None or given is None else torch.where(mask, tokens, given)
