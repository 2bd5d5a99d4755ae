"""The discriminator of a VQGAN: one judgement for every small part of a picture, of its pixels and of what an encoder
sees in it.

Sources: [0] Isola et al. 2017, arXiv 1611.07004 (patches). [1] Miyato et al. 2018, arXiv 1802.05957 (spectral norm,
    which keeps it
smooth without statistics of a batch). [2] Sauer et al. 2021, arXiv 2111.01007 (judging the features of a frozen
network).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from digit.core.config import config
from digit.models.transformer import PositiveInt


@config
class DiscriminatorConfig:
    """Shape of a discriminator.

    Attributes:
        channels: width after the first convolution over pixels; it doubles with every further one.
        levels: convolutions over pixels that halve the side.
        feature_channels: hidden width of the judge of each layer of features.
    """

    channels: PositiveInt = 64
    levels: PositiveInt = 2
    feature_channels: PositiveInt = 64


class Discriminator(nn.Module):
    """Pictures, and layers of features of them, to maps of logits, high for real."""

    def __init__(self, config: DiscriminatorConfig, feature_dims: Sequence[int] = ()) -> None:
        """Build.

        Args:
            config: the shape.
            feature_dims: width of every layer of features that is judged besides the pixels.
        """
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for level in range(config.levels):
            width = config.channels << level
            layers += [_convolution(before, width, 4, stride=2), nn.LeakyReLU(0.2)]
            before = width
        layers += [_convolution(before, 2 * before, 3), nn.LeakyReLU(0.2), _convolution(2 * before, 1, 3)]
        self.pixels = nn.Sequential(*layers)
        hidden = config.feature_channels
        self.features = nn.ModuleList(
            nn.Sequential(_convolution(dim, hidden, 1), nn.LeakyReLU(0.2), _convolution(hidden, 1, 3))
            for dim in feature_dims
        )

    def forward(self, images: Tensor, features: Sequence[Tensor] = ()) -> list[Tensor]:
        """Judge.

        Args:
            images: (B, 3, S, S) in 0..1.
            features: (B, C, h, w) each, C as announced.

        Returns:
            Logits (B, 1, S / 2^levels, S / 2^levels) of the pixels, then (B, 1, h, w) of every layer.
        """
        judges = zip(self.features, features, strict=True)
        return [self.pixels(images * 2 - 1), *(judge(_unit(layer)) for judge, layer in judges)]


def _unit(layer: Tensor) -> Tensor:
    """Features (B, C, h, w) whose channels have a mean square of 1 everywhere. A perceptual encoder gives unit vectors,
    of which many channels leave each one small, and a judge whose steepness is bounded could say little about those.
    """
    return F.normalize(layer, dim=1) * math.sqrt(layer.shape[1])


def _convolution(width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Module:
    made: nn.Module = spectral_norm(nn.Conv2d(width_in, width, kernel, stride, padding=(kernel - stride + 1) // 2))
    return made
