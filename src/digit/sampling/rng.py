"""Randomness per image: image ``i`` of a run with seed ``s`` sees the same numbers in any batch, on any device, in any
order.

Every draw of a token needs one uniform number (inverse transform sampling), so all numbers of an image fit in a few
kilobytes and are made beforehand on the host, by a counter-based generator keyed with (seed, image, stage).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from digit.core.errors import DigitError
from digit.models.feedforward import FeedForwardConfig

Seeds = int | Sequence[int]
"""Of a run, from 0 up; or of each image by itself."""


def uniforms(seed: Seeds, images: Sequence[int], stage: str, shape: tuple[int, ...]) -> Float[Tensor, " B *shape"]:
    """Uniform numbers in [0, 1) for some images of a run, in float32 on the CPU.

    They have one seed, or one each, and (B,) numbers within the run. The stages "prior", "ar", "masked" ... of an image
    are independent. ``shape`` is of the numbers of an image.
    """
    seeds = [seed] * len(images) if isinstance(seed, int) else list(seed)
    if bad := [s for s in seeds if s < 0]:
        raise DigitError(f"The seed {bad[0]} was given; expected a number from 0 up.")
    tag = zlib.crc32(stage.encode())
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([s, int(i), tag]))).random(shape, dtype=np.float32)
        for s, i in zip(seeds, images, strict=True)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def pixel_latents(
    config: FeedForwardConfig, images: Sequence[int], seed: Seeds = 0, temperature: float = 1.0, stage: str = "onepass"
) -> Float[Tensor, "B noise_dim"]:
    """Normal noise, in float32 on the CPU, that decides what a feed-forward decoder's tokens leave open; see
    :func:`uniforms`. The temperature is its standard deviation; 0 gives the middle of all images that they allow.
    """
    u = uniforms(seed, images, stage, (config.noise_dim,))
    # in float64 on the host, so that it is the same number on every machine
    normal: Tensor = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
    return (temperature * normal).float()
