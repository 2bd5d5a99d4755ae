"""An exponential moving average of the weights: smoother than the last step's, and usually better to sample from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averages of named parameters, on their device and in their dtype.

    After step k the average moves by ``1 - min(decay, (1 + k) / (10 + k))``, so that a short run is not dominated by its
    random start (the same ramp as TensorFlow's ExponentialMovingAverage with ``num_updates``).

    Attributes:
        averages: by parameter name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters as they are after ``step`` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self.parameters.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Take averages that were saved."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.averages[name] = self.averages[name], parameter.data
