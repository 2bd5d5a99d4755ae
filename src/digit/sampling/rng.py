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


def uniforms(seed: int, images: Sequence[int], stage: str, shape: tuple[int, ...]) -> Float[Tensor, " B *shape"]:
    """Uniform numbers in [0, 1) for some images of a run.

    Args:
        seed: of the run, >= 0.
        images: (B,) numbers of the images within the run.
        stage: "prior", "ar", "masked", ...; stages of one image are independent.
        shape: numbers an image.

    Returns:
        (B, *shape) float32 on the CPU.
    """
    if seed < 0:
        raise DigitError(f"The seed {seed} was given; expected a number from 0 up.")
    tag = zlib.crc32(stage.encode())
    rows = [
        np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(i), tag]))).random(
            shape, dtype=np.float32
        )
        for i in images
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)
