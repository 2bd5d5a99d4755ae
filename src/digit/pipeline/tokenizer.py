"""From images to the tokens that a prior predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.core.transforms import center_crop, resize_shorter
from digit.encoders.base import Encoder
from digit.models.codebook import Codebook
from digit.models.vqgan import VQGAN

Images = Tensor | Sequence[Image.Image]
"""(B, 3, S, S) in 0..1 with S the model's size; or Pillow images of any size, whose shorter side is scaled to S and
whose middle is cut out."""


class Tokenizer(Protocol):
    """Images to tokens (B, N), row by row.

    Attributes:
        image_size: side S of the square images it takes.
        grid: (rows, columns) of the tokens of an image.
        num_tokens: N.
        vocab_size: ids are 0..vocab_size-1.
    """

    @property
    def image_size(self) -> int: ...  # noqa: D102
    @property
    def grid(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    def encode(self, images: Images) -> Tensor: ...  # noqa: D102


class SemanticTokenizer:
    """The semantic tokenizer: a frozen encoder, and a codebook that was fitted on its features."""

    def __init__(self, encoder: Encoder, codebook: Codebook) -> None:
        codebook.check_encoder(encoder)
        self.encoder, self.codebook = encoder, codebook

    @property
    def image_size(self) -> int:
        """Side of the square images it takes."""
        return self.encoder.preprocessing.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image."""
        return self.encoder.grid

    @property
    def num_tokens(self) -> int:
        """Tokens an image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def vocab_size(self) -> int:
        """Clusters, K."""
        return self.codebook.config.clusters

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """Images to features (B, N, D)."""
        return self.encoder(prepare(images, self.image_size).to(self.codebook.centroids.device))

    @torch.inference_mode()
    def encode(self, images: Images) -> Tensor:
        """Images to semantic tokens (B, N) int64.

        Raises:
            DigitError: a tensor of another shape, or no image at all.
        """
        return self.codebook.assign(self.features(images))

    def to(self, device: torch.device | str) -> SemanticTokenizer:
        """Move to a device."""
        self.encoder.to(device)
        self.codebook.to(device)
        return self

    def __repr__(self) -> str:
        rows, columns = self.grid
        return f"SemanticTokenizer({self.image_size} px -> {rows} x {columns} of {self.vocab_size} tokens)"


class VQTokenizer:
    """A VQGAN's encoder and codebook."""

    def __init__(self, vqgan: VQGAN) -> None:
        self.vqgan, self.image_size, self.grid = vqgan, vqgan.config.resolution, vqgan.config.grid
        self.num_tokens, self.vocab_size = vqgan.num_tokens, vqgan.config.codes

    @torch.inference_mode()
    def encode(self, images: Images) -> Tensor:
        """Images to VQ tokens (B, M) int64."""
        return self.vqgan.encode(prepare(images, self.image_size).to(self.vqgan.codebook.device))


def prepare(images: Images, size: int) -> Tensor:
    """Images of any size, or a tensor that is ready, to (B, 3, size, size) in 0..1."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise DigitError(
                f"Images of shape {tuple(images.shape)} were given; expected (B, 3, {size}, {size}) in 0..1."
            )
        return images
    given = [images] if isinstance(images, Image.Image) else list(images)
    if not given:
        raise DigitError("No images were given; expected at least one.")
    return torch.stack([to_tensor(center_crop(resize_shorter(p.convert("RGB"), size), size)) for p in given])
