"""The hinge losses of a GAN (Lim and Ye 2017, arXiv 1705.02894), and when and how strongly the generator feels them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """() from logits of any shape: real ones should be above 1, fake ones below -1."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_hinge(fake: Tensor) -> Tensor:
    """() from logits of any shape: fakes should be judged high."""
    return -fake.mean()


def ramp(progress: float, start: float, warmup: float) -> float:
    """0 before ``start``, then linearly to 1 over ``warmup``; all three are shares of the run."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / warmup) if warmup else 1.0
