"""The hinge losses of a GAN (Lim and Ye 2017, arXiv 1705.02894), and when and how strongly the generator feels them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """() from maps of logits: real ones should be above 1, fake ones below -1. Every map counts alike, whatever its
    size.
    """
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean() / 2


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """() from maps of logits: fakes should be judged high. Every map counts alike."""
    return -torch.stack([f.mean() for f in fake]).mean()


def ramp(progress: float, start: float, warmup: float) -> float:
    """0 before ``start``, then linearly to 1 over ``warmup``; all three are shares of the run."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / warmup) if warmup else 1.0
