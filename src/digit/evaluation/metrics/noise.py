"""Small changes to images and to tokens, each drawn for its own image, under which stability is measured.

Pixels: Gaussian noise of a given signal-to-noise ratio (the paper's Table 1), JPEG, blur, shift, brightness. Tokens:
replacement by one of the nearest codes (RobusTok, arXiv 2509.12474). Image ``i`` under seed ``s`` always meets the same
noise, in any batch; all levels of noise are one draw, scaled, so that a curve over levels is smooth.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from digit.core.config import config
from digit.core.errors import DigitError, require
from digit.core.images import to_pil, to_tensor
from digit.models.codebook import nearest
from digit.sampling.rng import uniforms

Kind = Literal["noise", "jpeg", "blur", "shift", "brightness"]

_LABELS = {
    "noise": "noise at {:g} dB",
    "jpeg": "JPEG quality {:g}",
    "blur": "blur of {:g} px",
    "shift": "shift by {:g} px",
    "brightness": "brightness by {:g}",
}


@config
class Change:
    """One change of the pixels.

    Attributes:
        kind: what is done.
        level: noise: SNR in dB, infinity for none. jpeg: quality, 1 to 100. blur: standard deviation in pixels. shift:
            whole pixels to the right, edge pixels repeated. brightness: factor.
    """

    kind: Kind
    level: float

    def __post_init__(self) -> None:
        allowed = {
            "noise": not math.isnan(self.level),
            "jpeg": 1 <= self.level <= 100 and float(self.level).is_integer(),
            "blur": 0 <= self.level < math.inf,
            "shift": self.level >= 0 and float(self.level).is_integer(),
            "brightness": 0 <= self.level < math.inf,
        }
        if not allowed[self.kind]:
            raise ValueError(f"{self.kind} cannot have the level {self.level}")

    def __str__(self) -> str:
        return _LABELS[self.kind].format(self.level)


@config
class NoiseModel:
    """How an SNR becomes noise.

    Attributes:
        signal: "power" is the mean square of an image's pixels in 0..1, "variance" the mean square about their mean.
            The paper does not say which.
        clip: cut the noisy pixels back to 0..1, as an image file would; the noise that remains is weaker than asked.
        seed: of the noise.
    """

    signal: Literal["power", "variance"] = "power"
    clip: bool = True
    seed: Annotated[int, Field(ge=0)] = 0


def apply_change(images: Tensor, change: Change, numbers: Sequence[int], model: NoiseModel | None = None) -> Tensor:
    """Change images (B, 3, H, W) in 0..1, whose ``numbers`` within their set choose the noise.

    Returns:
        (B, 3, H, W), in 0..1 except for noise that is not clipped.
    """
    if change.kind == "noise":
        return add_noise(images, change.level, numbers, model or NoiseModel())
    if change.kind == "brightness":
        return (images * change.level).clamp(0, 1)
    return {"jpeg": jpeg, "blur": blur, "shift": shift}[change.kind](images, change.level)


def add_noise(images: Tensor, snr: float, numbers: Sequence[int], model: NoiseModel) -> Tensor:
    """White Gaussian noise with a power of ``10 ** (-snr / 10)`` times the signal power of each image."""
    if snr == math.inf:
        return images
    scale = (signal_power(images, model.signal) / 10 ** (snr / 10)).sqrt()  # (B,)
    noise = normals(model.seed, numbers, tuple(images.shape[1:])).to(images)  # (B, 3, H, W)
    noisy = images + scale[:, None, None, None] * noise
    return noisy.clamp(0, 1) if model.clip else noisy


def signal_power(images: Tensor, signal: str) -> Tensor:
    """The signal power (B,) of images (B, 3, H, W)."""
    flat = images.flatten(1).double()  # (B, 3 H W)
    return (flat.square().mean(1) if signal == "power" else flat.var(1, correction=0)).to(images.dtype)


def realised_snr(images: Tensor, changed: Tensor, signal: str) -> Tensor:
    """The SNR (B,) in dB that a change really has; infinite where nothing changed."""
    error = (changed - images).flatten(1).double().square().mean(1)
    return 10 * torch.log10(signal_power(images, signal).double() / error)


def normals(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (B, *shape) float32, those of image ``i`` drawn from (seed, i) alone."""
    seeds = (np.random.SeedSequence([seed, int(i), zlib.crc32(b"pixel noise")]) for i in numbers)
    draws = [np.random.Generator(np.random.Philox(one)).standard_normal(shape, dtype=np.float32) for one in seeds]
    return torch.from_numpy(np.stack(draws))


def jpeg(images: Tensor, quality: float) -> Tensor:
    """Save as JPEG (Pillow, its default chroma subsampling) and read again."""
    read = []
    for image in images.cpu():
        to_pil(image).save(buffer := io.BytesIO(), format="JPEG", quality=int(quality))
        read.append(to_tensor(Image.open(buffer)))
    return torch.stack(read).to(images)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur over three standard deviations, edge pixels repeated."""
    if sigma == 0:
        return images
    gaussian = require("scipy.ndimage", "eval", "Blurring images").gaussian_filter
    how = {"axes": (2, 3), "mode": "nearest", "radius": math.ceil(3 * sigma)}
    return torch.from_numpy(gaussian(images.cpu().numpy(), sigma, **how)).to(images)


def shift(images: Tensor, pixels: float) -> Tensor:
    """Move the content to the right; the left edge is repeated."""
    columns = (torch.arange(images.shape[3], device=images.device) - int(pixels)).clamp(min=0)
    return images[..., columns]


@torch.no_grad()
def perturb_tokens(
    features: Tensor, codes: Tensor, share: float, neighbours: int, numbers: Sequence[int], seed: int = 0
) -> Tensor:
    """Replace each token with probability ``share`` by one of the ``neighbours`` codes nearest to its feature.

    All of them are equally likely, and the token's own is one of them. Source: RobusTok's latent perturbation (its
    alpha and delta).

    Args:
        features: (B, N, D) continuous.
        codes: (K, D).
        share: 0 to 1.
        neighbours: 1 to K.
        numbers: (B,) of the images within their set; with ``seed`` they choose what is replaced.

    Returns:
        (B, N) int64 ids.

    Raises:
        DigitError: share or neighbours out of range.
    """
    if not 0 <= share <= 1:
        raise DigitError(f"A share of {share} tokens was to be replaced; expected 0 to 1.")
    if not 1 <= neighbours <= len(codes):
        raise DigitError(f"One of {neighbours} nearest codes was asked for; this codebook has {len(codes)}.")
    draws = uniforms(seed, numbers, "token perturbation", (2, features.shape[1])).to(features.device)  # (B, 2, N)
    rank = (draws[:, 1] * neighbours).long().clamp(max=neighbours - 1)  # (B, N)
    others = []
    for x, r in zip(features.float(), rank, strict=True):  # one image at a time: N x K distances
        # |x|^2 is left out, it changes no order within a row
        distances = codes.square().sum(1) - 2 * x @ codes.T  # (N, K)
        others.append(distances.topk(neighbours, largest=False).indices.gather(1, r[:, None]).squeeze(1))  # (N,)
    return torch.where(draws[:, 0] < share, torch.stack(others), nearest(features, codes))
