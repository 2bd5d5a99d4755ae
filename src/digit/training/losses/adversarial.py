"""The hinge losses of a GAN, when and how strongly the generator feels them, and what steadies the discriminator.

Sources: [0] Lim and Ye 2017, arXiv 1705.02894 (hinge). [1] Esser et al. 2021, arXiv 2012.09841, section 3.1 (adaptive
weight). [2] Tseng et al. 2021, arXiv 2104.03310 (LeCAM). [3] Zhao et al. 2020, arXiv 2006.10738 (DiffAugment).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["color", "translation", "cutout"]
"""One of DiffAugment's [3]."""


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """() from maps of logits: real ones should be above 1, fake ones below -1; 1 is chance. Every map counts alike,
    whatever its size.
    """
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean() / 2


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """() from maps of logits: fakes should get high ones. Every map counts alike."""
    return -torch.stack([f.mean() for f in fake]).mean()


def lecam(real: Sequence[Tensor], fake: Sequence[Tensor], averages: Tensor) -> Tensor:
    """() how far logits stand on the wrong side of ``averages`` (maps, 2), those of the real and fake logits of earlier
    batches, squared [2].
    """
    terms = [
        F.relu(r - mean_fake).square().mean() + F.relu(mean_real - f).square().mean()
        for r, f, (mean_real, mean_fake) in zip(real, fake, averages, strict=True)
    ]
    return torch.stack(terms).mean()


def gradient_ratio(loss: Tensor, adversarial: Tensor, at: Tensor, limit: float) -> Tensor:
    """() norm of the gradient of ``loss`` at ``at``, in units of that of ``adversarial``; at most ``limit`` [1]."""
    ours, theirs = (torch.autograd.grad(value, at, retain_graph=True)[0].norm() for value in (loss, adversarial))
    ratio: Tensor = (ours / (theirs + 1e-6)).clamp(max=limit).detach()
    return ratio


def ramp(progress: float, start: float, warmup: float) -> float:
    """0 before ``start``, then linearly to 1 over ``warmup``; all three are shares of the run."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / warmup) if warmup else 1.0


def augment(images: Tensor, kinds: Sequence[Augmentation]) -> Tensor:
    """Images (B, 3, S, S) in 0..1, each changed at random (torch's global generator), so that gradients pass [3]."""
    for kind in kinds:
        images = _AUGMENTATIONS[kind](images)
    return images


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) * (high - low) + low  # (B, 1, 1, 1)


def _color(images: Tensor) -> Tensor:
    """Brightness, saturation and contrast. Values outside 0..1 are left."""
    images = images + _uniform(images, -0.25, 0.25)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * _uniform(images, 0, 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5)


def _translation(images: Tensor) -> Tensor:
    """Moved by up to an eighth of the side; what comes into view is gray."""
    count, _, side, _ = images.shape
    most = side // 8
    padded = F.pad(images, (most,) * 4, value=0.5)  # (B, 3, S + 2 m, S + 2 m)
    moves = torch.randint(2 * most + 1, (2, count, 1), device=images.device)
    rows, columns = moves + torch.arange(side, device=images.device)  # (B, S) each
    example = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _cutout(images: Tensor) -> Tensor:
    """A square of half the side is gray, wherever its centre falls."""
    side = images.shape[-1]
    places = torch.arange(side, device=images.device)
    centres = torch.randint(side, (2, len(images), 1), device=images.device)
    rows, columns = (places - centres).abs() < side // 4  # (B, S) each
    hidden = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, S, S)
    return images.masked_fill(hidden, 0.5)


_AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
