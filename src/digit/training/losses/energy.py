"""The energy distance: how far images made of noise are from one image of the same tokens, and from each other.

The mean distance to the image, less half of the mean distance of two draws, is smallest where draws are distributed as
images are, so a network that is trained for it keeps the variety that a pixel loss averages away, and it needs no
discriminator. Distances are those of parts of an image: what a network sees at a place and in a window of places,
windows of pixels, and the whole in few pixels.

Sources: Gneiting and Raftery 2007, doi 10.1198/016214506000001437, section 4.3 (the energy score); Gritsenko et al.
2020, arXiv 2008.01160 (training a generator with it). Which parts are compared is this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _COARSE = 8, 4  # pixels along the side of a window, and of what becomes one pixel of the whole
_LEAST = 1e-10  # below a root, whose slope has no bound at 0


@dataclass(frozen=True)
class Seen:
    """Images (B, 3, S, S), and the layers (B, C, h, w) of what networks see in them."""

    images: Tensor
    layers: Sequence[Tensor]


def energy(first: Seen, second: Seen, real: Seen) -> tuple[Tensor, Tensor]:
    """() the energy distance of two draws and an image, each kind of part in units of its own distance to the image;
    and () the mean distance of two draws in those units, 1 where they vary as images do.
    """
    return energy_score((distances(first, real) + distances(second, real)) / 2, distances(first, second))


def energy_score(near: Tensor, apart: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`energy` from the mean distances (kinds,) of draws to the image, and of two draws."""
    unit = near.detach().clamp(min=1e-6)
    return ((near - apart / 2) / unit).mean(), (apart.detach() / unit).mean()


def distances(some: Seen, others: Seen) -> Tensor:
    """Mean distances (kinds,): of each layer at a place and in a window of places, then of windows of pixels, then of
    the whole. Windows lie side by side; where they begin in an image is the objective's ``shift``.
    """
    side, found = some.images.shape[-1], []
    for one, other in zip(some.layers, others.layers, strict=True):
        squares = (one - other).square().sum(1)  # (B, h, w)
        width = squares.shape[-1]
        found += [_mean_root(squares), _windows(squares, min(width, max(4, _WINDOW * width // side)))]
    found.append(_windows((some.images - others.images).square().sum(1), _WINDOW))
    coarse = F.avg_pool2d(some.images, _COARSE) - F.avg_pool2d(others.images, _COARSE)
    return torch.stack([*found, _mean_root(coarse.square().sum((1, 2, 3)))])


def _windows(squares: Tensor, side: int) -> Tensor:
    return _mean_root(F.avg_pool2d(squares, side, divisor_override=1))


def _mean_root(squares: Tensor) -> Tensor:
    return (squares + _LEAST).sqrt().mean()
