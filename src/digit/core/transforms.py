"""Cutting, scaling and mirroring images, on Pillow alone. Everything random takes its generator as an argument.

The random resized crop is that of "Going deeper with convolutions" (Szegedy et al. 2015, section 6): an area in a range
and an aspect ratio from 3/4 to 4/3, drawn log-uniformly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal, get_args

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from digit.core.config import config
from digit.core.errors import DigitError

Step = Callable[[Image.Image, np.random.Generator], Image.Image]
Box = tuple[int, int, int, int]
Filter = Literal["bicubic", "bilinear", "lanczos", "box"]
"""How images are resized: Pillow's filters, with antialiasing. The authors resize training images with bicubic and the
reference images of FID with bilinear, torchvision's default (prepare_imgnet_val.py at cd6d8ca)."""
FILTERS: tuple[Filter, ...] = get_args(Filter)


@config
class Transform:
    """How an image becomes a square of ``size`` pixels.

    Attributes:
        crop: center and random: the shorter side is scaled to ``size`` (or ``resize``), then the square is cut in the
            middle or anywhere. random-resized: a random part of the image is scaled to the square. none: the image must
            have the size already.
        flip: mirror left to right with probability one half.
        scale: for random-resized: the least and the greatest share of the image's area.
    """

    size: Annotated[int, Field(ge=1)]
    crop: Literal["center", "random", "random-resized", "none"] = "center"
    flip: bool = False
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.2, 1.0)
    filter: Filter = "bicubic"
    resize: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"a crop of {self.size} pixels does not fit into a shorter side of resize={self.resize}")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must go from less to more, not from {self.scale[0]} to {self.scale[1]}")

    @property
    def is_random(self) -> bool:
        """Whether two passes over one image can differ."""
        return self.flip or self.crop in ("random", "random-resized")


def build_transform(transform: Transform) -> Step:
    """The function (image, generator) -> image that a config describes; one generator state gives one image."""
    size, filter, before = transform.size, transform.filter, transform.resize or transform.size
    crops: dict[str, Step] = {
        "center": lambda image, _: center_crop(resize_shorter(image, before, filter), size),
        "random": lambda image, rng: random_crop(resize_shorter(image, before, filter), size, rng),
        "random-resized": lambda image, rng: random_resized_crop(image, size, transform.scale, rng, filter),
        "none": lambda image, _: _must_be(image, size),
    }
    crop = crops[transform.crop]
    if not transform.flip:
        return crop

    def flipped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        cut = crop(image, rng)
        return ImageOps.mirror(cut) if rng.random() < 0.5 else cut

    return flipped


def resize_shorter(image: Image.Image, size: int, filter: str = "bicubic") -> Image.Image:
    """Scale so that the shorter side has ``size`` pixels; the longer one is rounded."""
    width, height = image.size
    if min(width, height) == size:
        return image
    ratio = size / min(width, height)
    new = (size, max(size, round(height * ratio))) if width <= height else (max(size, round(width * ratio)), size)
    return image.resize(new, resampling(filter))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square of ``size`` pixels in the middle; of an odd margin the smaller half is at the left and top."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return _crop(image, (left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square of ``size`` pixels anywhere inside the image."""
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return _crop(image, (left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator, filter: str = "bicubic"
) -> Image.Image:
    """A random part of the image, with a share of its area in ``scale``, stretched to ``size`` x ``size``."""
    box = _random_box(image.size, scale, rng)
    return image.resize((size, size), resampling(filter), box=box)


def resampling(filter: str) -> Image.Resampling:
    """Pillow's name of a filter; a DigitError where there is no such filter."""
    if filter not in FILTERS:
        raise DigitError(f"The filter '{filter}' was given; expected one of {', '.join(FILTERS)}.")
    return Image.Resampling[filter.upper()]


def _random_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> Box:
    width, height = size
    for _ in range(10):  # a tall box may not fit a wide image: draw again
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _crop(image: Image.Image, box: Box) -> Image.Image:
    return image if box == (0, 0, *image.size) else image.crop(box)


def _must_be(image: Image.Image, size: int) -> Image.Image:
    if image.size != (size, size):
        raise DigitError(
            f"An image of {image.width}x{image.height} pixels was met where {size}x{size} is expected and crop is "
            "'none'; choose crop 'center', or import the images with: digit data folder SRC --size"
        )
    return image
