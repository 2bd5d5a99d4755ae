"""What an encoder is, and the explicit preprocessing between an image and its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.config import PositiveInt, config
from digit.core.errors import DigitError
from digit.models.component import weights_checksum as weights_checksum

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Combine = Literal["sum", "mean", "concat"]
"""How the outputs of several blocks become one feature."""


def combined(parts: list[Tensor], how: Combine) -> Tensor:
    """One feature (B, N, D) of those of several blocks, each (B, N, d)."""
    if len(parts) == 1:
        return parts[0]
    if how == "concat":
        return torch.cat(parts, dim=2)
    return torch.stack(parts).mean(0) if how == "mean" else torch.stack(parts).sum(0)


def as_written(fields: dict[str, Any]) -> dict[str, Any]:
    """An encoder's config: without several layers as the first edition wrote it, which caches are compared with."""
    unused = () if fields["layers"] else ("layers", "combine")
    return {name: value for name, value in fields.items() if name not in unused}


@config
class Preprocessing:
    """From images in 0..1 to what the network sees, saved with the encoder, so that fitting and tokenizing cannot
    differ.

    It normalises first, then resizes, as the authors' code does (DAMO-NLP-SG/DiGIT at cd6d8ca, model.py).

    Attributes:
        image_size: side of the square images that come in; the tokenizer resizes and center-crops images to it.
        resize: side that the network sees; None leaves ``image_size``. The paper: 256 in, 224 seen.
        interpolation, antialias: how the tensor is resized (torch's names). The paper: bicubic, no antialias.
    """

    image_size: PositiveInt = 256
    resize: PositiveInt | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def describe(self) -> str:
        """Sizes in a few words."""
        return f"{self.image_size} px" + (f" seen at {self.resize}" if self.resize else "")

    @property
    def seen(self) -> int:
        """Side that the network sees."""
        return self.resize or self.image_size

    def check(self, images: Tensor) -> None:
        """Raise DigitError unless images are of the size in or the size seen."""
        sizes = sorted({self.image_size, self.seen}, reverse=True)
        if images.shape[1:] not in [(3, size, size) for size in sizes]:
            expected = " or ".join(f"(B, 3, {size}, {size})" for size in sizes)
            raise DigitError(f"This encoder takes images {expected}; {tuple(images.shape)} was given.")

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise and resize (B, 3, H, W) in 0..1 to (B, 3, h, w)."""
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        x = (images - mean) / std
        size = self.seen
        if self.resize is None or (size, size) == tuple(x.shape[-2:]):
            return x
        return F.interpolate(x, size=(size, size), mode=self.interpolation, antialias=self.antialias)  # (B, 3, h, w)


@runtime_checkable
class Encoder(Protocol):
    """A frozen network from images to patch features; ``preprocessing`` is applied inside the call."""

    preprocessing: Preprocessing

    @property
    def dim(self) -> int:
        """Width D of a feature."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the features of one image; N = rows * columns, row by row."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Images (B, 3, S, S) in 0..1, S = ``preprocessing.image_size``, to features (B, N, D)."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move to a device or dtype, as :meth:`torch.nn.Module.to`."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
