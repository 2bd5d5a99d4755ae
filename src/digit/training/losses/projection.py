"""An encoder in self-supervised training: its network, and heads that exist only while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import TransformersEncoder

TrainableEncoder = ConvEncoder | TransformersEncoder


def summary_and_patches(
    encoder: TrainableEncoder, images: Tensor, masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One vector an image and its patch features: the CLS token of a ViT, the mean of a convolutional grid.

    Args:
        encoder: a network of its own size or, as views may be smaller, of any side that its patches tile.
        images: (B, 3, s, s) in 0..1.
        masked: (B, N) bool, patches that the ViT sees as its mask token.

    Returns:
        (B, D) and (B, N, D).
    """
    pixels = encoder.preprocessing(images)
    if isinstance(encoder, ConvEncoder):
        patches = encoder.features(pixels)  # (B, N, D)
        return patches.mean(1), patches
    states = encoder.network(pixels, bool_masked_pos=masked).last_hidden_state  # (B, 1 + N, D)
    return states[:, 0], states[:, encoder.prefix :]


class Projection(nn.Module):
    """An encoder with a head on the image's vector and, where patches are learned from too, one on theirs."""

    def __init__(self, encoder: TrainableEncoder, head: nn.Module, patch_head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.patch_head = patch_head

    def forward(self, images: Tensor, masked: Tensor | None = None, take: Tensor | None = None) -> tuple[Tensor, ...]:
        """Project images (B, 3, s, s).

        Args:
            images: in 0..1.
            masked: (B, N) bool, the patches that are hidden from the network.
            take: (B, N) bool, the n patches whose projections are wanted.

        Returns:
            Float32 tensors: the projections (B, P), the vectors they were made of (B, D), and with ``take`` (n, P).
        """
        vector, patches = summary_and_patches(self.encoder, images, masked)
        out = (self.head(vector).float(), vector.float())
        if take is None or self.patch_head is None:
            return out
        return (*out, self.patch_head(patches[take]).float())


def check_trainable(encoder: TrainableEncoder, masks: bool) -> None:
    """See that a network can be trained by a method.

    Args:
        encoder: the network.
        masks: the method hides patches, which takes a ViT with a mask token.

    Raises:
        DigitError: it cannot.
    """
    if encoder.preprocessing.resize is not None:
        raise DigitError("An encoder is trained on views of its own size: leave preprocessing.resize out.")
    network: Any = getattr(encoder, "network", None)
    if masks and getattr(getattr(network, "embeddings", None), "mask_token", None) is None:
        raise DigitError(
            "This method hides patches from the network, which needs a DINOv2-like ViT (model.kind: vit); "
            "for a convolutional encoder choose simclr, vicreg, or dino with patch_weight 0."
        )


def exact(images: Tensor) -> Any:
    """A block in which autocast is off, for losses that 16 bits would blur."""
    return torch.autocast(images.device.type, enabled=False)
