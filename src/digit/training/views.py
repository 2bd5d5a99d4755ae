"""Random views of a batch of images, made with tensors alone: fast on a GPU, and on two CPU cores beside the training.

Drawing and applying are two steps: :func:`draw_views` draws the numbers on the CPU, example by example, so that a seed
gives the same views on every device; :func:`apply_views` makes the views wherever the images are. The recipe is that of
SimCLR and DINO (random resized crop, flip, colour jitter, grey, blur) and, if asked for, white noise; no torchvision.

Sources: [0] Chen et al. 2020, arXiv 2002.05709, appendix A. [1] Caron et al. 2021, arXiv 2104.14294, section 3. Unlike
there, the four colour changes are applied in one order, as one affine map of the three channels, and clamped once.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from digit.core.config import NonNegative, PositiveInt, Share, config

# luma weights (ITU-R BT.601), and the YIQ axes in which a hue change is a rotation
_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@config
class Views:
    """How one random view is made of an image; ``presets/bases/encoder.yaml`` explains the fields.

    A crop's aspect ratio is 3/4 to 4/3. The sigma of a blur is 0.1 to 2 in units of size / 32 pixels, the deviation of
    white noise up to 0.15 (10 dB below a usual image). Features are stable under what the views differ in; SimCLR and
    DINO have no noise, and small encoders learn no stability under it by themselves.
    """

    size: PositiveInt = 32
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    flip: Share = 0.5
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    jitter: Share = 0.8
    gray: Share = 0.2
    blur: Share = 0.0
    noise: Share = 0.0

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must go from less to more, not from {self.scale[0]} to {self.scale[1]}")


class ViewDraws(NamedTuple):
    """The numbers behind one view of each of B images.

    Attributes:
        crop: (B, 2, 3) the affine map of the crop and flip, in ``affine_grid``'s coordinates.
        color: (B, 3, 3) the map of the channels: brightness, saturation, hue, grey.
        contrast: (B,) the contrast factor.
        sigma: (B,) of the blur, in pixels, 0 for none; (B, 0) where views have none.
        noise: (B, 3, size, size) what is added to the pixels at last; (B, 0) where views have none.
    """

    crop: Tensor
    color: Tensor
    contrast: Tensor
    sigma: Tensor
    noise: Tensor


def draw_views(count: int, views: Views, generator: torch.Generator) -> ViewDraws:
    """Draw one view for each of ``count`` images, from a CPU generator, in a fixed order."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    area, aspect = uniform(*views.scale), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # shares of the side
    # the image spans -1..1, so a crop of share w may be centred anywhere in +-(1 - w)
    x, y = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    mirror = torch.where(chance(views.flip), -1.0, 1.0)
    zero = torch.zeros(count)
    crop = torch.stack([width * mirror, zero, x, zero, height, y], 1).view(count, 2, 3)

    factors = [uniform(max(0.0, 1 - s), 1 + s) for s in (views.brightness, views.contrast, views.saturation)]
    brightness, contrast, saturation = factors
    angle = uniform(-views.hue, views.hue) * 2 * math.pi
    to_gray = torch.tensor(_LUMA).expand(3, 3)  # every channel becomes the luma
    saturate = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * to_gray  # (B, 3, 3)
    jittered = chance(views.jitter)
    color = torch.where(
        jittered[:, None, None], brightness[:, None, None] * saturate @ _hue_rotation(angle), torch.eye(3)
    )
    contrast = torch.where(jittered, contrast, 1.0)
    color = torch.where(chance(views.gray)[:, None, None], to_gray @ color, color)
    sigma = torch.where(chance(views.blur), uniform(0.1, 2.0) * views.size / 32, 0.0)
    if not views.blur:  # known here without asking the device
        sigma = sigma.new_empty(count, 0)
    noise = torch.empty(count, 0)
    if views.noise:
        deviation = torch.where(chance(views.noise), uniform(0.0, 0.15), 0.0)
        noise = torch.randn(count, 3, views.size, views.size, generator=generator) * deviation[:, None, None, None]
    return ViewDraws(crop, color, contrast, sigma, noise)


def apply_views(images: Tensor, draws: ViewDraws, size: int) -> Tensor:
    """The views (B, 3, size, size) of images (B, 3, H, W), both in 0..1, by draws on the same device."""
    grid = F.affine_grid(draws.crop, [len(images), 3, size, size], align_corners=False)  # (B, size, size, 2)
    x = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    x = _recolor(x, draws.color, draws.contrast)
    x = _blur(x, draws.sigma) if draws.sigma.numel() else x
    return (x + draws.noise).clamp(0, 1) if draws.noise.numel() else x


def _recolor(images: Tensor, color: Tensor, contrast: Tensor) -> Tensor:
    """Map x to c (M x) + (1 - c) m, where m is the mean luma of M x."""
    pixels = images.flatten(2)  # (B, 3, H * W)
    luma = images.new_tensor(_LUMA)
    factor = contrast[:, None, None]  # (B, 1, 1)
    middle = (luma @ (color @ pixels.mean(2, keepdim=True)))[:, None]  # (B, 1, 1)
    return torch.baddbmm((1 - factor) * middle, factor * color, pixels).view_as(images).clamp_(0, 1)


def _hue_rotation(angle: Tensor) -> Tensor:
    """Rotations of the chroma plane by ``angle`` (B) radians, as matrices on RGB (B, 3, 3)."""
    to_yiq = torch.tensor(_YIQ)
    turn = torch.eye(3).repeat(len(angle), 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    rotation: Tensor = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return rotation


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, separable, each image with its own ``sigma`` (B) in pixels."""
    radius = math.ceil(images.shape[-1] / 8)  # two sigmas of the widest
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    # a sigma of a thousandth of a pixel changes nothing
    kernel = torch.softmax(-(offsets**2) / (2 * sigma.clamp(min=1e-3)[:, None] ** 2), 1).to(images)  # (B, taps)
    x = F.pad(images, (radius,) * 4, mode="replicate").flatten(0, 1)[None]  # (1, B * 3, H + 2 r, W + 2 r)
    kernel = kernel.repeat_interleave(3, 0)[:, None]  # (B * 3, 1, taps)
    x = F.conv2d(x, kernel[:, :, :, None], groups=x.shape[1])
    x = F.conv2d(x, kernel[:, :, None, :], groups=x.shape[1])
    return x.view_as(images)
