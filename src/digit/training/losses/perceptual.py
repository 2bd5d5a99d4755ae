"""Perceptual distances: how different two batches of pictures look to a network that is not trained here.

"lpips" is Zhang et al. 2018, arXiv 1801.03924, as in the `lpips` package (VGG16; its weights are fetched once by torchvision).
"encoder" is the same idea without any download: unit-normed features of a frozen encoder of this library, layer by layer where it
is convolutional, all channels weighted alike. A self-supervised encoder ignores what its augmentations change (colour, a little
blur), so it stands beside a pixel loss and does not replace it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.encoders.conv import ConvEncoder
from digit.encoders.loading import load_encoder
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.errors import DigitError, require


class LpipsDistance(nn.Module):
    """LPIPS with VGG16."""

    def __init__(self) -> None:
        """Load the weights.

        Raises:
            DigitError: the package or the weights are missing.
        """
        super().__init__()
        lpips = require("lpips", "train", "the perceptual loss 'lpips'")
        try:
            self.network: Any = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
        except (URLError, OSError, RuntimeError) as error:
            raise DigitError(
                f"The perceptual loss 'lpips' needs the weights of VGG16, which could not be fetched ({error}). Put "
                f"vgg16-397923af.pth into {Path(torch.hub.get_dir()) / 'checkpoints'}, or set objective.perceptual to "
                "'encoder' or 'none'."
            ) from error

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance () of two batches (B, 3, S, S) in 0..1; gradients flow into ``images``."""
        distance: Tensor = self.network(images * 2 - 1, others * 2 - 1).float()
        return distance.mean()


class EncoderDistance(nn.Module):
    """Squared distance of unit-normed features of a frozen encoder, the mean over its layers."""

    def __init__(self, encoder: ConvEncoder | TransformersEncoder, size: int) -> None:
        """Take an encoder and the side of the pictures.

        Raises:
            DigitError: the encoder is for other pictures.
        """
        super().__init__()
        if encoder.preprocessing.image_size != size:
            raise DigitError(
                f"The perceptual encoder takes images of {encoder.preprocessing.image_size} pixels, the VQGAN's have {size}."
            )
        self.encoder = encoder.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, source: str, size: int) -> EncoderDistance:
        """See :func:`digit.encoders.loading.load_encoder`."""
        return cls(load_encoder(source), size)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance () of two batches (B, 3, S, S) in 0..1; gradients flow into ``images``."""
        with torch.no_grad():
            wanted = self._layers(others)
        distances = [(a - b).square().sum(-1).mean() for a, b in zip(self._layers(images), wanted, strict=True)]
        return torch.stack(distances).mean()

    def _layers(self, images: Tensor) -> list[Tensor]:
        """Unit features (B, N, D) of every layer; N and D differ between them."""
        pixels = self.encoder.preprocessing(images)
        if not isinstance(self.encoder, ConvEncoder):
            return [F.normalize(self.encoder(images).float(), dim=-1)]
        x = self.encoder.stem(pixels.contiguous(memory_format=torch.channels_last))
        layers = []
        for block in self.encoder.blocks:
            x = block(x)
            layers.append(F.normalize(x.float().flatten(2).transpose(1, 2), dim=-1))  # (B, H * W, C)
        return layers
