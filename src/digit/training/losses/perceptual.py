"""What frozen networks see in images, which a loss compares: the features of an encoder, and those of LPIPS's backbone
(Zhang et al. 2018, arXiv 1801.03924).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import TransformersEncoder

_VIT_LAYERS = 4


class EncoderView(nn.Module):
    """The layers of features that a frozen encoder sees in an image, for the distance and the discriminator.

    That is LPIPS without a download: all channels are weighted alike. A self-supervised encoder ignores what its
    augmentations change (colour, a little blur), so it stands beside a pixel loss and does not replace it.
    """

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
            self.dims = encoder.config.block_widths

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, S, S) in 0..1 to features (B, C, h, w), float32 and of unit length at every place: of each
        block of a convolutional encoder, or of four blocks of a ViT at equal distances.
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
        return _unit(layers)


def feature_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """() squared distance of unit features (B, C, h, w), the mean over places and over layers."""
    return torch.stack([(a - b).square().sum(1).mean() for a, b in zip(features, others, strict=True)]).mean()


def lpips_layers(network: Any, images: Tensor) -> list[Tensor]:
    """What LPIPS's backbone sees in images (B, 3, S, S) in 0..1: its five layers (B, C, h, w), float32 and of unit
    length at every place, before the trained heads.
    """
    scaled: Tensor = network.scaling_layer(images * 2 - 1)
    return _unit(network.net(scaled.contiguous(memory_format=torch.channels_last)))


def _unit(layers: Sequence[Tensor]) -> list[Tensor]:
    """Features (B, C, h, w) in float32 and of unit length at every place."""
    return [F.normalize(layer.float(), dim=1) for layer in layers]
