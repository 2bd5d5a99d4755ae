"""The energy distance: scipy's numbers, and the least for the right variety."""

import pytest
import torch
from scipy.stats import energy_distance

from digit.training.losses.energy import energy, parts


def test_it_is_the_energy_distance_of_one_number():
    """Of numbers x and y scipy gives sqrt(2 E|x - y| - E|x - x'| - E|y - y'|), from all pairs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, generator=generator), 0.5 + 2 * torch.randn(50, generator=generator)
    one, two, real = (t.reshape(1, 1, -1) for t in torch.meshgrid(x, x, y, indexing="ij"))
    value, apart = energy([one], [two], [real])
    unit, among = (x[:, None] - y).abs().mean(), (y[:, None] - y).abs().mean()
    assert float((2 * value * unit - among).sqrt()) == pytest.approx(energy_distance(x, y), rel=1e-4)
    assert float(apart * unit) == pytest.approx(float((x[:, None] - x).abs().mean()), rel=1e-5)


def test_the_right_variety_costs_least():
    """Each kind is in units of its own distance, so the gradient shows it, not the value."""
    generator = torch.Generator().manual_seed(0)
    one, two, real = (torch.randn(2000, 6, 1, generator=generator) for _ in range(3))
    for size, sign in ((0.5, -1), (1.0, 0), (2.0, 1)):
        scale = torch.tensor(size, requires_grad=True)
        value, variety = energy([scale * one], [scale * two], [real])
        value.backward()
        assert float(variety) == pytest.approx({0.5: 0.64, 1.0: 1.0, 2.0: 1.26}[size], abs=0.03)
        assert scale.grad.sign() == sign if sign else abs(scale.grad) < 0.03


def test_parts_are_places_windows_and_the_whole():
    images, layers = torch.rand(2, 3, 32, 32), [torch.rand(2, 5, 16, 16), torch.rand(2, 7, 8, 8)]
    found = parts(images, layers)
    assert [tuple(part.shape) for part in found] == [
        (2, 5, 256), (2, 7, 64), (2, 5 * 16, 16), (2, 7 * 16, 4), (2, 3 * 64, 16), (2, 192, 1),
    ]  # fmt: skip
    assert torch.equal(found[0][0, :, 17], layers[0][0, :, 1, 1])
    assert torch.equal(found[4][0, :, 5].view(3, 8, 8), images[0, :, 8:16, 8:16])
    assert float(found[5][1, 0, 0]) == pytest.approx(float(images[1, 0, :4, :4].mean()))
