"""From images to the tokens that a prior predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.images import load_image, to_tensor
from digit.core.transforms import center_crop, resize_shorter
from digit.encoders.base import Encoder
from digit.models.codebook import Codebook
from digit.models.vqgan import VQGAN

TOLERANCE = 1e-3
"""How far floats may leave 0..1, for rounding in half precision."""

Images = Any
"""One image or a batch of them, see :func:`prepare`."""


class Tokenizer:
    """Square images of side ``image_size`` to a grid of tokens (rows, columns), row by row (B, N), with ids from 0 to
    ``vocab_size`` - 1. Several tokens of a place (``depth``, of a residual codebook) lie side by side.
    """

    def __init__(self, image_size: int, grid: tuple[int, int], vocab_size: int, depth: int = 1) -> None:
        self.image_size, self.vocab_size, self.depth = image_size, depth * vocab_size, depth
        self.grid = grid[0], depth * grid[1]

    @property
    def num_tokens(self) -> int:
        """Tokens an image, N."""
        return self.grid[0] * self.grid[1]

    @torch.inference_mode()
    def encode(self, images: Images) -> Int[Tensor, "B N"]:
        """Tokens of images; for what counts as images, and errors, see :func:`prepare`."""
        return self._assign(prepare(images, self.image_size))

    def _assign(self, ready: Tensor) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        rows, columns = self.grid
        return f"{type(self).__name__}({self.image_size} px -> {rows} x {columns} of {self.vocab_size} tokens)"


class SemanticTokenizer(Tokenizer):
    """The semantic tokenizer: a frozen encoder, and a codebook of K clusters that was fitted on its features."""

    def __init__(self, encoder: Encoder, codebook: Codebook) -> None:
        codebook.check_encoder(encoder)
        config = codebook.config
        super().__init__(encoder.preprocessing.image_size, encoder.grid, config.clusters, config.depth)
        self.encoder, self.codebook = encoder, codebook

    @torch.inference_mode()
    def features(self, images: Images) -> Float[Tensor, "B N D"]:
        """The encoder's features of images; floats may leave 0..1, as noisy images do."""
        return self.encoder(prepare(images, self.image_size, bounded=False).to(self.codebook.centroids.device))

    def _assign(self, ready: Tensor) -> Tensor:
        return self.codebook.tokens(self.features(ready))

    def to(self, device: torch.device | str) -> SemanticTokenizer:
        """Move to a device."""
        self.encoder.to(device)
        self.codebook.to(device)
        return self


class VQTokenizer(Tokenizer):
    """A VQGAN's encoder and codebook."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__(vqgan.config.resolution, vqgan.config.grid, vqgan.config.codes)
        self.vqgan = vqgan

    def _assign(self, ready: Tensor) -> Tensor:
        return self.vqgan.encode(ready.to(self.vqgan.codebook.device))


def prepare(images: Images, size: int, bounded: bool = True) -> Float[Tensor, "B 3 size size"]:
    """Images in 0..1, of the model's size.

    Args:
        images: one image or a sequence of images, each a Pillow image, a path, a numpy array (H, W, 3) uint8, or a
            tensor (3, H, W), uint8 or float in 0..1. Or a batch of them: (B, H, W, 3), (B, 3, H, W).
        size: where an image is larger or smaller its shorter side is scaled to it, and the middle cut out. Tensors of
            floats must have it already, for scaling them would round to 8 bits.
        bounded: refuse floats outside 0..1.

    Raises:
        DigitError: none of these, no image at all, values outside 0..1, or floats of another size.
    """
    batch = images if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4 else [images]
    if len(batch) == 0:
        raise DigitError("No images were given; expected at least one.")
    if isinstance(batch, Tensor) and batch.is_floating_point():
        return _floats(batch, size, bounded)
    return torch.cat([_one(image, size, bounded) for image in batch])


def _one(image: Any, size: int, bounded: bool) -> Tensor:
    """(1, 3, size, size)"""
    if isinstance(image, Tensor) and image.is_floating_point():
        return _floats(image[None], size, bounded)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3:
        image = image.movedim(0, -1).cpu().numpy()  # (H, W, 3)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3:
        image = Image.fromarray(image)
    if isinstance(image, (str, Path)):
        image = load_image(image)
    if not isinstance(image, Image.Image):
        shape = f" of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "shape") else ""
        raise DigitError(
            f"A {type(image).__name__}{shape} was given as an image; expected a Pillow image, a path, a numpy array "
            "(H, W, 3) of uint8, or a tensor (3, H, W) of uint8 or of floats in 0..1."
        )
    return to_tensor(center_crop(resize_shorter(image.convert("RGB"), size), size))[None]


def _floats(images: Tensor, size: int, bounded: bool) -> Tensor:
    """(B, 3, size, size), checked."""
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise DigitError(f"Images of shape {tuple(images.shape)} were given; expected (B, 3, {size}, {size}) in 0..1.")
    low, high = (float(value) for value in images.aminmax()) if bounded else (0.0, 1.0)
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN, too
        guess = "images / 255" if high > 2 else "(images + 1) / 2"
        raise DigitError(
            f"Images with values from {low:.4g} to {high:.4g} were given; expected floats in 0..1, as from {guess}."
        )
    return images.float()
