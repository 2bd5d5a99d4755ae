"""The linear probe: one linear classifier per hidden state of a frozen prior, over the mean of its positions.

Source: the paper's linear probing; DAMO-NLP-SG/DiGIT at cd6d8ca: classifier n reads state n averaged over all
positions, the start position included. State 0 is the embedding, state n the output of block n; the output of the last
block is not probed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.models.component import Component


@config
class LinearProbeConfig:
    """S states of width D are probed, the embedding first (the authors: the prior's depth), for C classes."""

    dim: PositiveInt
    states: PositiveInt
    classes: PositiveInt

    def describe(self) -> str:
        """Its shape in a line."""
        return f"{self.states} states of width {self.dim} to {self.classes:,} classes"


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

    def forward(self, features: Float[Tensor, "S B D"]) -> Float[Tensor, "S B C"]:
        """Mean states of :func:`mean_states` to logits."""
        return torch.stack([classifier(x) for classifier, x in zip(self.classifiers, features, strict=True)])


def mean_states(states: Sequence[Float[Tensor, "B T D"]]) -> Float[Tensor, "S B D"]:
    """The probe's features: each state averaged over its positions."""
    return torch.stack([state.float().mean(1) for state in states])
