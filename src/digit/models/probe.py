"""The linear probe: one linear classifier per hidden state of a frozen prior, over the mean of its positions.

Source: the paper's linear probing; DAMO-NLP-SG/DiGIT at cd6d8ca: classifier n reads state n averaged over all
    positions, the start
position included. State 0 is the embedding, state n the output of block n; the output of the last block is not probed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from digit.core.config import config
from digit.models.component import Component
from digit.models.transformer import PositiveInt


@config
class LinearProbeConfig:
    """Shape of a probe.

    Attributes:
        dim: width D of the states.
        states: how many states are probed, the embedding first. The authors: the prior's depth.
        classes: C.
    """

    dim: PositiveInt
    states: PositiveInt
    classes: PositiveInt


class LinearProbe(Component):
    """A linear classifier per state; weights start as Normal(0, 0.01), biases as zero."""

    config_class = LinearProbeConfig
    config: LinearProbeConfig

    def __init__(self, config: LinearProbeConfig) -> None:
        super().__init__(config)
        self.classifiers = nn.ModuleList(nn.Linear(config.dim, config.classes) for _ in range(config.states))
        for classifier in self.classifiers:
            nn.init.normal_(classifier.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Mean states (S, B, D) of :func:`mean_states` to logits (S, B, C)."""
        return torch.stack([classifier(x) for classifier, x in zip(self.classifiers, features, strict=True)])


def mean_states(states: Sequence[Tensor]) -> Tensor:
    """The probe's features: states (B, T, D), each averaged over its positions, stacked to (S, B, D)."""
    return torch.stack([state.float().mean(1) for state in states])
