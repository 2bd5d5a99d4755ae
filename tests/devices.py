"""Where a test runs: always on the CPU, and on CUDA where there is a device."""

import pytest
import torch
from torch import Tensor

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none here"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def agreement(found: Tensor, expected: Tensor) -> float:
    """The share of equal tokens, on whatever devices they are."""
    assert found.shape == expected.shape
    return float((found.cpu() == expected.cpu()).double().mean())
