"""The patch discriminator of a VQGAN: one judgement for every small part of a picture.

Sources: Isola et al. 2017, arXiv 1611.07004 (patches). Miyato et al. 2018, arXiv 1802.05957 (spectral norm, which keeps it
smooth without statistics of a batch).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from digit.config import config
from digit.models.transformer import PositiveInt


@config
class DiscriminatorConfig:
    """Shape of a patch discriminator.

    Attributes:
        channels: width after the first convolution; it doubles with every further one.
        levels: convolutions that halve the side.
    """

    channels: PositiveInt = 64
    levels: PositiveInt = 2


class PatchDiscriminator(nn.Module):
    """Pictures to a map of logits, high for real."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for level in range(config.levels):
            width = config.channels << level
            layers += [spectral_norm(nn.Conv2d(before, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            before = width
        layers += [spectral_norm(nn.Conv2d(before, 2 * before, 3, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(2 * before, 1, 3, padding=1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in 0..1 to logits (B, 1, S / 2^levels, S / 2^levels)."""
        out: Tensor = self.layers(images * 2 - 1)
        return out
