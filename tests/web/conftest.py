"""A tiny model, `digit serve` running with it, and an image."""

import base64

import numpy as np
import pytest
from PIL import Image

import tiny
from digit.core.images import encode_png
from serving import running


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return tiny.pipeline().save_pretrained(tmp_path_factory.mktemp("web") / "model")


@pytest.fixture(scope="package")
def server(model, tmp_path_factory):
    with running(model, tmp_path_factory.mktemp("scratch")) as server:
        yield server


@pytest.fixture(scope="package")
def photo():
    """Base64 of a PNG file, wider than high."""
    noise = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return base64.b64encode(encode_png(Image.fromarray(noise))).decode()
