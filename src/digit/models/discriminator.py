"""The discriminator of a VQGAN: logits for every small part of an image, from its pixels and from what a frozen encoder
makes of it.

Sources: [0] Isola et al. 2017, arXiv 1611.07004 (patches). [1] Miyato et al. 2018, arXiv 1802.05957 (spectral norm).
[2] Sauer et al. 2021, arXiv 2111.01007 (features of a frozen network).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from digit.core.config import NonNegative, NonNegativeInt, PositiveInt, config

_GROUPS = 8


@config
class DiscriminatorConfig:
    """Shape of a discriminator, as ``presets/bases/pixels.yaml`` explains.

    Attributes:
        channels: it doubles with every further convolution.
        feature_channels: 0 leaves the features out.
        norm: "spectral" bounds every convolution [1]; "group" is group norm, and no bound.
        lecam: weight of the LeCAM regulariser; see :func:`~digit.training.losses.images.lecam`.
    """

    channels: PositiveInt = 64
    levels: PositiveInt = 2
    feature_channels: NonNegativeInt = 64
    norm: Literal["spectral", "group"] = "spectral"
    lecam: NonNegative = 0.0

    def __post_init__(self) -> None:
        widths = (self.channels, self.feature_channels)
        if self.norm == "group" and any(width % _GROUPS for width in widths):
            raise ValueError(
                f"norm 'group' needs channels and feature_channels in multiples of {_GROUPS}, not {widths}"
            )


class Discriminator(nn.Module):
    """Images, and layers of features of widths ``feature_dims``, to maps of logits, high for real. Where the config has
    ``lecam``, ``averages`` (maps, 2) are means of the real and fake logits of earlier batches.
    """

    averages: Tensor

    def __init__(self, config: DiscriminatorConfig, feature_dims: Sequence[int] = ()) -> None:
        """Build; ``feature_dims`` are the widths of the layers of features."""
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for level in range(config.levels):
            width = config.channels << level
            layers += _layer(config, before, width, 4, stride=2, first=not level)
            before = width
        layers += [*_layer(config, before, 2 * before, 3), _convolution(config, 2 * before, 1, 3)]
        self.pixels = nn.Sequential(*layers)
        hidden = config.feature_channels
        self.features = nn.ModuleList(
            nn.Sequential(*_layer(config, dim, hidden, 1), _convolution(config, hidden, 1, 3)) for dim in feature_dims
        )
        if config.lecam:
            self.register_buffer("averages", torch.zeros(1 + len(feature_dims), 2))

    def forward(self, images: Float[Tensor, "B 3 S S"], features: Sequence[Tensor] = ()) -> list[Tensor]:
        """Images in 0..1 and features (B, C, h, w) each to logits (B, 1, S / 2^levels, S / 2^levels) and (B, 1, h,
        w).
        """
        heads = zip(self.features, features, strict=True)
        return [self.pixels(images * 2 - 1), *(head(_unit(layer)) for head, layer in heads)]


def _unit(layer: Tensor) -> Tensor:
    """Features (B, C, h, w) of mean square 1 everywhere: of unit vectors, many channels leave each too small for a head
    whose steepness is bounded.
    """
    return F.normalize(layer, dim=1) * math.sqrt(layer.shape[1])


def _layer(
    config: DiscriminatorConfig, width_in: int, width: int, kernel: int, stride: int = 1, first: bool = False
) -> list[nn.Module]:
    """Convolution, group norm where there is one (right after the pixels it would lose their level), leaky ReLU."""
    norm = [nn.GroupNorm(_GROUPS, width)] if config.norm == "group" and not first else []
    return [_convolution(config, width_in, width, kernel, stride), *norm, nn.LeakyReLU(0.2)]


def _convolution(config: DiscriminatorConfig, width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Module:
    convolution: nn.Module = nn.Conv2d(width_in, width, kernel, stride, padding=(kernel - stride + 1) // 2)
    return spectral_norm(convolution) if config.norm == "spectral" else convolution
