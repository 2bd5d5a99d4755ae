"""Perceptual distances: how different two batches of images look to a network that is not trained here.

"lpips" is Zhang et al. 2018, arXiv 1801.03924, with VGG16 (:mod:`digit.models.lpips`; its weights are
fetched once). "encoder" is the same idea without any download: unit features of a frozen encoder of this library, layer
by layer where it is convolutional, all channels weighted alike. A self-supervised encoder ignores what its
augmentations change (colour, a little blur), so it stands beside a pixel loss and does not replace it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.models.lpips import load_lpips

_VIT_LAYERS = 4


class LpipsDistance(nn.Module):
    """LPIPS with VGG16."""

    def __init__(self) -> None:
        """Load the weights; a DigitError where the package or the weights are missing."""
        super().__init__()
        try:
            self.network = load_lpips("vgg").network
        except DigitError as error:
            raise DigitError(f"{error} Or set objective.perceptual to 'encoder' or 'none'.") from error

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Mean distance () of two batches (B, 3, S, S) in 0..1; gradients flow into ``images``."""
        distance: Tensor = self.network(images * 2 - 1, others * 2 - 1).float()
        return distance.mean()


class EncoderView(nn.Module):
    """The layers of features that a frozen encoder sees in an image, for the distance and the discriminator."""

    def __init__(self, encoder: ConvEncoder | TransformersEncoder, size: int) -> None:
        """Take an encoder and the side of the images; a DigitError where the encoder is for images of another size."""
        super().__init__()
        if encoder.preprocessing.image_size != size:
            raise DigitError(
                f"The perceptual encoder takes images of {encoder.preprocessing.image_size} pixels, those "
                f"that are to be made have {size}."
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.dims: list[int] = [encoder.dim] * _VIT_LAYERS
        if isinstance(encoder, ConvEncoder):
            self.dims = [
                width for width, n in zip(encoder.config.widths, encoder.config.blocks, strict=True) for _ in range(n)
            ]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in 0..1 to features (B, C, h, w), float32 and of unit length at every place.

        Of a convolutional encoder, what each of its blocks gives; of a ViT, four blocks at equal distances.
        """
        encoder = self.encoder
        if isinstance(encoder, TransformersEncoder):
            states = encoder.states(images)  # depth tensors (B, N, D)
            chosen = [states[len(states) * (i + 1) // _VIT_LAYERS - 1] for i in range(_VIT_LAYERS)]
            layers = [state.transpose(1, 2).reshape(len(images), -1, *encoder.grid) for state in chosen]
        else:
            x, layers = encoder.stem(encoder.preprocessing(images).contiguous(memory_format=torch.channels_last)), []
            for block in encoder.blocks:
                x = block(x)
                layers.append(x)
        return [F.normalize(layer.float(), dim=1) for layer in layers]


def feature_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """() squared distance of unit features (B, C, h, w), the mean over places and over layers."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(features, others, strict=True)]).mean()
