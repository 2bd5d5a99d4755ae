"""An exponential moving average of the weights: smoother than the last step's, and usually better to sample from.

torch's ``AveragedModel`` keeps a second module; this keeps tensors alone, which may be shards (FSDP2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from digit.training.sharding import like, local


class EMA:
    """Averages of named parameters, on their device and in their dtype.

    After step k the average moves by ``1 - min(decay, (1 + k) / (10 + k))``, so that a short run is not dominated by
    its random start (the ramp of TensorFlow's ExponentialMovingAverage with ``num_updates``).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters as they are after ``step`` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, parameters = ([local(t.detach()) for t in each.values()] for each in (self.averages, self.parameters))
        torch._foreach_lerp_(averages, parameters, weight)

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
            average.copy_(like(averages[name], average))

    @torch.no_grad()
    def _swap(self) -> None:
        # values, not tensors: FSDP2 keeps its own reference to a parameter's memory
        for name, parameter in self.parameters.items():
            weight, average = local(parameter.detach()), local(self.averages[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
