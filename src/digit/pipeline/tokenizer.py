"""The semantic tokenizer: a frozen encoder and a codebook, from pictures to semantic tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from digit.core.errors import DigitError
from digit.encoders.base import Encoder
from digit.models.codebook import Codebook


class SemanticTokenizer:
    """Pictures to semantic tokens (B, N), ids 0..K-1, row by row.

    Attributes:
        encoder: frozen; its preprocessing is part of it.
        codebook: fitted on features of this encoder.
    """

    def __init__(self, encoder: Encoder, codebook: Codebook) -> None:
        if encoder.dim != codebook.config.dim:
            raise DigitError(
                f"The encoder's features are {encoder.dim} wide and the codebook's centroids {codebook.config.dim}: "
                "the codebook was fitted on another encoder. Fit one with: digit fit-codebook"
            )
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
    def features(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Images to features (B, N, D); see :meth:`encode` for what is accepted."""
        return self.encoder(prepare(images, self.image_size).to(self.codebook.centroids.device))

    @torch.inference_mode()
    def encode(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Images to semantic tokens.

        Args:
            images: (B, 3, S, S) in 0..1 with S = ``image_size``, or pictures of any size, whose shorter side is scaled
                to S and whose middle is cut out.

        Returns:
            (B, N) int64.

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


def prepare(images: Tensor | Sequence[Image.Image], size: int) -> Tensor:
    """Pictures of any size, or a tensor that is ready, to (B, 3, size, size) in 0..1."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise DigitError(
                f"Images of shape {tuple(images.shape)} were given; expected (B, 3, {size}, {size}) in 0..1."
            )
        return images
    from digit.core.images import to_tensor
    from digit.core.transforms import center_crop, resize_shorter

    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures:
        raise DigitError("No images were given; expected at least one.")
    return torch.stack([to_tensor(center_crop(resize_shorter(p.convert("RGB"), size), size)) for p in pictures])
