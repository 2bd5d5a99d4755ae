"""Randomness belongs to the image."""

import pytest
import torch

from digit.core.errors import DigitError
from digit.sampling.rng import uniforms


def test_an_image_sees_the_same_numbers_in_any_company():
    whole = uniforms(3, range(10), "prior", (5,))
    assert torch.equal(uniforms(3, [7, 2], "prior", (5,)), whole[[7, 2]])
    assert uniforms(3, [], "prior", (5,)).shape == (0, 5)


def test_seeds_images_and_stages_differ():
    a = uniforms(0, [0], "prior", (64,))
    for b in (uniforms(1, [0], "prior", (64,)), uniforms(0, [1], "prior", (64,)), uniforms(0, [0], "ar", (64,))):
        assert (a != b).all()


def test_numbers_are_uniform():
    u = uniforms(0, range(1000), "prior", (256,)).flatten()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - len(u) / 50).square() / (len(u) / 50)).sum() < 90  # chi-square, 49 degrees: p about 3e-4


def test_numbers_are_frozen():
    """The very numbers of this version: a change would silently change every seed's pictures."""
    expected = torch.tensor([[0.7066020965576172, 0.7248613834381104, 0.4644755721092224]])
    assert torch.equal(uniforms(0, [0], "prior", (3,)), expected)


def test_negative_seeds_are_refused():
    with pytest.raises(DigitError, match="expected a number from 0 up"):
        uniforms(-1, [0], "prior", (3,))
