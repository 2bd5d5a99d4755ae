"""A saved tiny model and a photograph, for commands."""

import numpy as np
import pytest
from PIL import Image

import tiny


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path
