from dataclasses import replace

import pytest
import torch

from digit.core.errors import DigitError
from digit.core.files import read_tensors, sha256_of, write_tensors
from digit.models.lpips import BACKBONES, load_lpips, untrained


@pytest.fixture
def pair():
    """Two times (4, 3, 64, 64) uint8."""
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    noise = 10 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return images.byte(), (images + noise).round().clamp(0, 255).byte()


def test_it_is_the_packages_network(pair, backbone_file):
    found = load_lpips("alex", backbone_file)
    torch.manual_seed(0)
    package = untrained("alex").eval()
    with torch.inference_mode():
        expected = package(*(images.float() / 127.5 - 1 for images in pair)).flatten()
    assert torch.equal(found(*pair), expected)
    assert found(pair[0], pair[0]).abs().max() == 0
    assert found.description == "lpips 0.1.4 (alex), backbone: file: alexnet.pth"


def test_the_publishers_file_is_fetched_once_and_cached(pair, backbone_file, monkeypatch, tmp_path):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    published = replace(BACKBONES["alex"], url=backbone_file.as_uri(), sha256=sha256_of(backbone_file))
    monkeypatch.setitem(BACKBONES, "alex", published)
    first = load_lpips("alex")
    backbone_file.unlink()
    assert torch.equal(load_lpips("alex")(*pair), first(*pair))
    (cached,) = (tmp_path / "cache").iterdir()
    assert all(name.startswith("features.") for name in read_tensors(cached))


def test_what_was_tried_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKBONES, "alex", replace(BACKBONES["alex"], url="https://127.0.0.1:9/alexnet.pth"))
    with pytest.raises(
        DigitError, match=r"Tried .*lpips-alex.safetensors.*; https://127.0.0.1:9/alexnet.pth could not be reached"
    ):
        load_lpips("alex")
    with pytest.raises(DigitError, match="There are no weights at"):
        load_lpips("alex", tmp_path / "none.pth")
    write_tensors(tmp_path / "other.safetensors", {"features.0.weight": torch.zeros(1)})
    with pytest.raises(DigitError, match=r"does not hold the backbone of LPIPS .alex.: features\.0\.weight"):
        load_lpips("alex", tmp_path / "other.safetensors")
    with pytest.raises(DigitError, match="LPIPS with 'dino' was asked for"):
        load_lpips("dino")
