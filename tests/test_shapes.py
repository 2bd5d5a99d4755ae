"""Shapes in signatures are checked in the tests, and only there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from digit.models.codebook import Codebook, nearest
from digit.sampling.rng import uniforms

WORK = (
    "import torch; from digit.models.codebook import nearest; print(nearest(torch.zeros(2, 3), torch.ones(4, 3)).shape)"
)


def test_a_wrong_shape_is_refused_with_its_names():
    book = Codebook.from_centroids(torch.randn(5, 4))
    assert book.assign(torch.randn(2, 3, 4)).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="centroids"):
        nearest(torch.randn(2, 4), torch.randn(4))
    with pytest.raises(TypeCheckError, match="features"):
        book.assign(torch.zeros(2, 4, dtype=torch.long))
    assert uniforms(0, [1, 2], "prior", (3,)).shape == (2, 3)


def test_a_compiler_sees_the_plain_function():
    compiled = torch.compile(lambda x, c: nearest(x, c) + 1, backend="eager", fullgraph=True)
    x, c = torch.randn(6, 4), torch.randn(5, 4)
    assert torch.equal(compiled(x, c), nearest(x, c) + 1)


def test_nothing_is_checked_outside_of_tests():
    code = f"{WORK}; import sys; print('beartype' in sys.modules, hasattr(nearest, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["torch.Size([2])", "False False"]


def test_the_rooms_exist():
    import shapes

    package = Path(__file__).parents[1] / "src"
    assert all((package / room.replace(".", "/")).is_dir() for room in shapes.ROOMS)
