"""The energy distance: scipy's numbers, the least for the right variety, and every part of an image in plain words."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import energy_distance
from torch import Tensor

from digit.training.losses.energy import Seen, distances, energy, energy_score


def seen(*shapes: tuple[int, ...], scale: Tensor | float = 1.0, generator: torch.Generator) -> Seen:
    images, *layers = (scale * torch.randn(shape, generator=generator) for shape in shapes)
    return Seen(images, layers)


def test_it_is_the_energy_distance_of_one_number():
    """Of numbers x and y scipy gives sqrt(2 E|x - y| - E|x - x'| - E|y - y'|), from all pairs."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, generator=generator), 0.5 + 2 * torch.randn(50, generator=generator)
    near, apart, among = ((a[:, None] - b).abs().mean() for a, b in ((x, y), (x, x), (y, y)))
    value, variety = energy_score(near[None], apart[None])
    assert float((2 * value * near - among).sqrt()) == pytest.approx(energy_distance(x, y), rel=1e-4)
    assert float(variety * near) == pytest.approx(float(apart), rel=1e-5)


def test_the_right_variety_costs_least():
    """Each kind is in units of its own distance, so the gradient shows it, not the value."""
    for size, sign in ((0.5, -1), (1.0, 0), (2.0, 1)):
        generator, scale = torch.Generator().manual_seed(0), torch.tensor(size, requires_grad=True)
        shapes = (20, 3, 16, 16), (20, 6, 10, 10)
        draws = [seen(*shapes, scale=scale, generator=generator) for _ in range(2)]
        value, variety = energy(*draws, seen(*shapes, generator=generator))
        value.backward()
        assert float(variety) == pytest.approx({0.5: 0.63, 1.0: 1.0, 2.0: 1.265}[size], abs=0.03)
        assert scale.grad is not None
        assert scale.grad.sign() == sign if sign else abs(scale.grad) < 0.03


def test_distances_are_those_of_places_windows_and_the_whole():
    generator = torch.Generator().manual_seed(0)
    one, other = (seen((2, 3, 32, 32), (2, 5, 16, 16), (2, 7, 8, 8), (2, 9, 2, 2), generator=generator) for _ in "ab")

    def plain(function) -> float:  # type: ignore[no-untyped-def]
        return float(torch.linalg.vector_norm(function(one) - function(other), dim=1).mean())

    expected = [
        plain(lambda some: some.layers[0]),
        plain(lambda some: F.unfold(some.layers[0], 4, stride=4)),
        plain(lambda some: some.layers[1]),
        plain(lambda some: F.unfold(some.layers[1], 4, stride=4)),
        plain(lambda some: some.layers[2]),
        plain(lambda some: some.layers[2].flatten(1)),
        plain(lambda some: F.unfold(some.images, 8, stride=8)),
        plain(lambda some: F.avg_pool2d(some.images, 4).flatten(1)),
    ]
    assert distances(one, other).tolist() == pytest.approx(expected, rel=1e-5)


def test_equal_images_have_a_gradient():
    some = Seen(torch.rand(2, 3, 16, 16, requires_grad=True), ())
    distances(some, Seen(some.images.detach(), ())).sum().backward()
    assert some.images.grad is not None
    assert some.images.grad.isfinite().all()
