"""What the ways to train an encoder share: the network, and heads that exist only while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.training.task import Batch, Step

TrainableEncoder = ConvEncoder | TransformersEncoder


class Method:
    """A way to learn features.

    Attributes:
        encoder: what is validated and exported.
        modules: what a checkpoint keeps; ``modules["student"]`` is trained.
    """

    encoder: TrainableEncoder
    modules: dict[str, nn.Module]

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of ``count`` examples, each tensor with them in its first dimension."""
        raise NotImplementedError

    def loss(
        self, modules: nn.ModuleDict, images: Tensor, batch: Batch, step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of images (B, 3, S, S) in 0..1, and metrics."""
        raise NotImplementedError

    def after_step(self, modules: nn.ModuleDict, step: Step) -> None:
        """What moves besides the optimizer; here nothing."""


def summary_and_patches(
    encoder: TrainableEncoder, images: Tensor, masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One vector an image (B, D), the CLS token of a ViT or the mean of a convolutional grid, and patches (B, N, D).

    Views (B, 3, s, s) in 0..1 may be smaller than the encoder's images; a ViT sees its mask token at the patches
    ``masked`` (B, N) bool.
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
        """Projections (B, P) of images (B, 3, s, s) in 0..1, the vectors (B, D) they were made of, and with a patch
        head those of the n patches of ``take`` (B, N) bool, (n, P); all in float32. ``masked`` (B, N) are hidden.
        """
        vector, patches = summary_and_patches(self.encoder, images, masked)
        out = (self.head(vector).float(), vector.float())
        if take is None or self.patch_head is None:
            return out
        return (*out, self.patch_head(patches.flatten(0, 1)[take.flatten()]).float())


def check_trainable(encoder: TrainableEncoder, masks: bool) -> None:
    """Raise DigitError unless a method can train a network; one that ``masks`` takes a ViT with a mask token."""
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
