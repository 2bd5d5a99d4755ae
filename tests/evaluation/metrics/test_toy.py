import json
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from digit.cli.app import app
from digit.evaluation.metrics.toy import ToyConfig, draw, fit, toy


@pytest.fixture(scope="module")
def result():
    return toy(ToyConfig(samples=4000, repeats=4)).values


def test_directions_are_the_known_ones():
    """PCA finds the long axis; LDA the covariance's inverse times the difference of the means."""
    settings = ToyConfig(samples=50_000, angle=0.0)
    points, labels = draw(settings, np.random.default_rng(0))
    within = np.diag(np.square(settings.spread))
    expected_lda = np.linalg.solve(within, settings.offset)
    expected_pca = np.linalg.eigh(within + np.outer(settings.offset, settings.offset))[1][:, -1]
    assert fit("LDA", points, labels).direction @ expected_lda / np.linalg.norm(expected_lda) > 0.9999
    assert abs(fit("PCA", points, labels).direction @ expected_pca) > 0.9999


def test_turning_the_plane_turns_the_directions():
    flat, turned = (draw(ToyConfig(angle=angle), np.random.default_rng(0)) for angle in (0.0, 90.0))
    for method in ("PCA", "LDA"):
        x, y = fit(method, *flat).direction
        np.testing.assert_allclose(fit(method, *turned).direction, [-y, x], atol=1e-6)


def test_accuracy_follows_the_gaussian_tail(result):
    """On a projected Gaussian pair the best threshold is right with probability Phi(distance / deviation)."""
    settings = ToyConfig()
    lda = np.array(settings.offset) / np.square(settings.spread)
    lda /= np.linalg.norm(lda)
    for level, seen in zip(result.noise, result.accuracy["LDA"], strict=True):
        deviation = np.sqrt(np.square(lda * settings.spread).sum() + level**2)
        assert seen == pytest.approx(NormalDist().cdf(lda @ settings.offset / deviation), abs=0.012)


def test_lda_is_above_pca_throughout_and_both_fall(result):
    pca, lda = np.array(result.accuracy["PCA"]), np.array(result.accuracy["LDA"])
    assert (lda > pca).all()
    assert (np.diff(lda) < 0).all()
    assert lda[0] > 0.93
    assert pca[0] < 0.7
    assert lda[-1] < 0.6


def test_the_same_seed_gives_the_same_numbers():
    settings = ToyConfig(samples=50, repeats=2)
    assert toy(settings).values == toy(settings).values
    assert toy(settings).values != toy(ToyConfig(samples=50, repeats=2, seed=1)).values


def test_command_writes_image_and_numbers(tmp_path):
    done = CliRunner().invoke(app, ["toy", "pca-lda", "--out", str(tmp_path), "--samples", "100", "--repeats", "2"])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["settings"]["samples"] == 100
    assert f"{written['values']['accuracy']['LDA'][0]:.1%}" in done.output
    assert "this project's choice" in written["notes"][0]
    with Image.open(tmp_path / "pca-lda.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 100
