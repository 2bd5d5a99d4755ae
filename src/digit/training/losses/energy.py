"""The energy distance: how far images made of noise are from one image of the same tokens, and from each other.

The mean distance to the image, less half of the mean distance of two draws, is smallest where draws are distributed as
images are, so a network that is trained for it keeps the variety that a pixel loss averages away, and it needs no
discriminator. Distances are those of parts of an image: what an encoder sees at a place and in a window of places,
windows of pixels, and the whole in few pixels.

Sources: Gneiting and Raftery 2007, doi 10.1198/016214506000001437, section 4.3 (the energy score); Gritsenko et al.
2020, arXiv 2008.01160 (training a generator with it). Which parts are compared is this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _COARSE = 8, 4  # pixels along the side of a window, and of what becomes one pixel of the whole


def parts(images: Tensor, layers: Sequence[Tensor]) -> list[Tensor]:
    """Vectors (B, D, n) of which each is compared: of images (B, 3, S, S), and of layers (B, C, h, w) of what an
    encoder sees in them. Windows lie side by side; where they begin in an image is the objective's ``shift``.
    """
    side = images.shape[-1]
    found = [layer.flatten(2) for layer in layers]
    for layer in layers:
        window = max(4, _WINDOW * layer.shape[-1] // side)
        found.append(F.unfold(layer, window, stride=window))
    found.append(F.unfold(images, _WINDOW, stride=_WINDOW))
    found.append(F.avg_pool2d(images, _COARSE).flatten(1)[:, :, None])
    return found


def energy(first: Sequence[Tensor], second: Sequence[Tensor], real: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """() the energy distance of two draws and an image, from their parts (B, D, n), each kind in units of its own
    distance to the image; and () the mean distance of two draws in those units, 1 where they vary as images do.
    """
    near = (_distances(first, real) + _distances(second, real)) / 2  # (kinds,)
    apart = _distances(first, second)
    unit = near.detach().clamp(min=1e-6)
    return ((near - apart / 2) / unit).mean(), (apart.detach() / unit).mean()


def _distances(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    pairs = zip(some, others, strict=True)
    return torch.stack([torch.linalg.vector_norm(a - b, dim=1).mean() for a, b in pairs])
