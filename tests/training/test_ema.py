import pytest
import torch
from torch import nn

from digit.training.engine import EMA


def test_average_follows_the_closed_form() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA({"w": parameter}, decay=0.9)
    expected = torch.zeros(3)
    for step in range(200):
        parameter.data = torch.full((3,), float(step % 7))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step % 7)
    torch.testing.assert_close(ema.averages["w"], expected)


def test_applied_swaps_and_swaps_back_even_after_an_error() -> None:
    parameter = nn.Parameter(torch.ones(2))
    ema = EMA({"w": parameter}, decay=0.5)
    parameter.data.fill_(3.0)

    def fail() -> None:
        with ema.applied():
            assert parameter.tolist() == [1.0, 1.0]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert parameter.tolist() == [3.0, 3.0]
    assert ema.averages["w"].tolist() == [1.0, 1.0]


def test_load_takes_saved_averages() -> None:
    ema = EMA({"w": nn.Parameter(torch.ones(2))}, decay=0.5)
    ema.load({"w": torch.tensor([4.0, 5.0])})
    with ema.applied():
        assert ema.parameters["w"].tolist() == [4.0, 5.0]
