"""Which noise an image would have: a network that serves the training of a feed-forward decoder and is thrown away.

Source: Zhu et al. 2017, arXiv 1711.11586 (BicycleGAN).
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Posterior(nn.Module):
    """Mean and log variance (B, noise_dim) of an image's noise."""

    def __init__(self, noise_dim: int, channels: int) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], 2 * noise_dim)
        # begin with a noise that tells something of the image, or the decoder learns to do without
        nn.init.constant_(self.out.bias[noise_dim:], -2.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images (B, 3, S, S) in 0..1, in no more than 64 pixels: light and colours need no detail."""
        side = min(64, images.shape[-1])
        features = self.layers(F.adaptive_avg_pool2d(images, side) * 2 - 1).mean((2, 3))  # (B, 4 C)
        mean, log_variance = self.out(features).float().chunk(2, 1)
        return mean, log_variance.clamp(-8, 8)


def drawn(mean: Tensor, log_variance: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (B, d) made of ``fresh`` normal numbers (B, d), and what it tells of the image: () nats, the mean."""
    information = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
    return mean + (log_variance / 2).exp() * fresh, information
