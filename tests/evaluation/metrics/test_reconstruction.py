import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import fidelity
from digit.evaluation.metrics.reconstruction import psnr, reconstruction, ssim
from digit.models.lpips import load_lpips


@pytest.fixture(scope="session")
def photographs(cifar512):
    """(64, 3, 32, 32) uint8."""
    pixels, _ = open_dataset(cifar512).subset(range(64)).arrays()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def noisy(photographs):
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    return (photographs + 10 * noise).round().clamp(0, 255).to(torch.uint8)


# ---- PSNR and SSIM ---------------------------------------------------------------------------------------------------


def test_psnr_is_its_definition(photographs, noisy):
    error = (photographs.double() - noisy.double()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(psnr(photographs, noisy), 10 * torch.log10(255**2 / error), rtol=0, atol=1e-9)
    assert psnr(photographs, photographs).isinf().all()


def test_ssim_is_its_definition(photographs, noisy):
    """Wang et al. 2004, eq. 13, over all 11 x 11 windows that lie inside the image."""
    line = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(values):
        return torch.nn.functional.conv2d(values.flatten(0, 1)[:, None], window)

    a, b = photographs[:8].double(), noisy[:8].double()
    covariance, c1, c2 = mean(a * b) - mean(a) * mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    expected = (
        (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2) / ((mean(a) ** 2 + mean(b) ** 2 + c1) * (variances + c2))
    )
    torch.testing.assert_close(ssim(photographs[:8], noisy[:8]), expected.reshape(8, -1).mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(ssim(photographs, photographs), torch.ones(64, dtype=torch.float64))


def test_small_images_are_refused(photographs):
    with pytest.raises(DigitError, match="windows of 11 x 11 pixels"):
        ssim(photographs[:, :, :8, :8], photographs[:, :, :8, :8])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (torch.zeros(64, 3, 16, 16, dtype=torch.uint8), "differ in shape"),
        (torch.zeros(64, 3, 32, 32), "torch.float32 were given; expected"),
        (torch.zeros(64, 1, 32, 32, dtype=torch.uint8), "expected .B, 3, H, W. uint8 RGB"),
    ],
)
def test_pairs_that_do_not_fit(photographs, other, sentence):
    with pytest.raises(DigitError, match=sentence):
        reconstruction([(photographs, other)])


# ---- together --------------------------------------------------------------------------------------------------------


def test_one_pass_equals_the_parts(photographs, noisy, pooling, backbone_file):
    network = load_lpips("alex", backbone_file)
    pairs = zip(photographs.split(20), noisy.split(20), strict=True)
    result = reconstruction(pairs, extractor=pooling, lpips=network, total=64)
    assert result.images == 64
    assert result.values["psnr"] == pytest.approx(float(psnr(photographs, noisy).mean()))
    assert result.values["ssim"] == pytest.approx(float(ssim(photographs, noisy).mean()))
    assert result.values["lpips"] == pytest.approx(float(network(photographs, noisy).mean()), abs=1e-6)
    assert result.values["rfid"] == pytest.approx(
        fidelity([noisy], [photographs], extractor=pooling).values["fid"], abs=1e-9
    )
    assert result.errors["psnr"] == pytest.approx(float(psnr(photographs, noisy).std() / 8))
    assert not result.not_measured
    assert set(result.methods) == {"psnr", "ssim", "lpips", "rfid"}
    assert json.loads(json.dumps(asdict(result)))["values"] == result.values


def test_originals_may_be_measured_before(photographs, noisy, pooling):
    before = measure([photographs], pooling, name="originals")
    given = reconstruction([(photographs, noisy)], extractor=pooling, originals=before)
    assert given.values == reconstruction([(photographs, noisy)], extractor=pooling).values


def test_what_is_missing_has_a_reason(photographs, noisy):
    result = reconstruction([(photographs, noisy)], reasons={"lpips": "the backbone was not found."})
    assert result.not_measured["lpips"] == "not measured: the backbone was not found."
    assert result.not_measured["rfid"] == "not measured: no FID network was given."
    assert set(result.values) == {"psnr", "ssim"}


def test_perfect_reconstructions(photographs, noisy, pooling):
    perfect = reconstruction([(photographs, photographs)], extractor=pooling)
    assert perfect.identical == 64
    assert "psnr" not in perfect.values
    assert "PSNR is infinite" in perfect.not_measured["psnr"]
    assert abs(perfect.values["rfid"]) < 1e-3
    mixed = noisy.clone()
    mixed[:10] = photographs[:10]
    half = reconstruction([(photographs, mixed)])
    assert half.identical == 10
    assert math.isfinite(half.values["psnr"])
    assert "10 of 64 reconstructions equal their originals" in half.notes[0]


def test_no_pairs():
    with pytest.raises(DigitError, match="No pairs"):
        reconstruction([])


def test_blur_is_worse_than_a_little_noise(photographs, noisy):
    blurred = torch.nn.functional.avg_pool2d(photographs.float(), 5, 1, 2, count_include_pad=False).to(torch.uint8)
    sharp, soft = (reconstruction([(photographs, other)]).values for other in (noisy, blurred))
    assert np.sign(sharp["psnr"] - soft["psnr"]) == np.sign(sharp["ssim"] - soft["ssim"]) == 1
