import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from digit.core.errors import DigitError
from digit.core.files import sha256_of, write_tensors
from digit.core.weights import download
from digit.evaluation.metrics import inception
from digit.evaluation.metrics.inception import (
    InceptionWeights,
    OnnxExtractor,
    TorchExtractor,
    load_inception,
    open_extractor,
)


@pytest.fixture
def pair(small_images):
    """Two of the images: a forward pass takes a good part of a second each."""
    return small_images[:2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIGIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def without_head(full: InceptionWeights) -> InceptionWeights:
    return InceptionWeights({k: v for k, v in full.tensors.items() if not k.startswith("fc.")}, "features", full.sha256)


def test_is_torch_fidelitys_extractor_bit_for_bit(random_inception, pair, tmp_path):
    torch.save(random_inception.tensors, tmp_path / "weights.pth")
    layers = ["2048", "logits_unbiased"]
    reference = FeatureExtractorInceptionV3(
        "reference", layers, feature_extractor_weights_path=tmp_path / "weights.pth"
    )
    seen = []
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: seen.append(out))
    features, logits, spatial = TorchExtractor(load_inception(tmp_path / "weights.pth"))(pair)
    expected = reference(pair)
    assert features.shape == (2, 2048)
    assert features.std() > 0.01
    assert torch.equal(features, expected[0])
    assert torch.equal(logits, expected[1])
    # of sFID: the first 7 of 192 channels at 17 x 17 places, in the order row, column, channel
    assert seen[0].shape == (2, 192, 17, 17)
    assert spatial.shape == (2, 2023)
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0].movedim(1, 3)[..., :7])


def test_onnx_agrees_with_torch(random_inception, pair, cache):
    expected, expected_logits, expected_spatial = TorchExtractor(random_inception)(pair)
    features, logits, spatial = OnnxExtractor(random_inception)(pair)
    scale = expected.abs().max()
    assert (features - expected).abs().max() < 1e-5 * scale
    assert (logits - expected_logits).abs().max() < 1e-4 * expected_logits.abs().max()
    assert (spatial - expected_spatial).abs().max() < 1e-5 * expected_spatial.abs().max()
    assert [file.name for file in cache.iterdir()] == [f"inception-{random_inception.sha256[:12]}-spatial.onnx"]
    assert torch.equal(OnnxExtractor(random_inception)(pair).features, features)  # from the cache


def test_features_do_not_depend_on_the_batch(random_inception, pair):
    extractor = TorchExtractor(random_inception)
    whole = extractor(pair).features
    single = torch.cat([extractor(image[None]).features for image in pair])
    assert (whole - single).abs().max() < 1e-5 * whole.abs().max()


def test_no_head_means_no_logits(random_inception, pair):
    weights = without_head(random_inception)
    assert not weights.has_head
    features, logits, _ = TorchExtractor(weights)(pair)
    assert logits is None
    assert torch.equal(features, TorchExtractor(random_inception)(pair)[0])


def test_checksum_names_the_weights_not_the_file(random_inception, tmp_path):
    torch.save(
        {**random_inception.tensors, "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(7)}, tmp_path / "a.pth"
    )
    write_tensors(tmp_path / "b.safetensors", without_head(random_inception).tensors)
    pth, safetensors = load_inception(tmp_path / "a.pth"), load_inception(tmp_path / "b.safetensors")
    assert pth.sha256 == safetensors.sha256 == random_inception.sha256
    assert (pth.source, pth.has_head) == ("file: a.pth", True)
    assert not safetensors.has_head
    changed = {**random_inception.tensors, "Mixed_7c.branch_pool.bn.bias": torch.ones(192)}
    write_tensors(tmp_path / "c.safetensors", changed)
    assert load_inception(tmp_path / "c.safetensors").sha256 != random_inception.sha256


def test_cache_is_used_before_anything_else(random_inception, cache):
    write_tensors(cache / "inception-2015-12-05.safetensors", random_inception.tensors)
    found = load_inception("auto")
    assert found.source == "cache: inception-2015-12-05.safetensors"
    assert found.sha256 == random_inception.sha256


def test_the_first_editions_file_without_a_head_still_opens(random_inception, cache):
    write_tensors(cache / "inception-2015-12-05-features.safetensors", without_head(random_inception).tensors)
    for name in ("auto", "wheel"):
        found = load_inception(name)
        assert (found.sha256, found.has_head) == (random_inception.sha256, False)


def published(monkeypatch, url, sha256="6726825d"):
    monkeypatch.setattr(inception, "PUBLISHED", replace(inception.PUBLISHED, url=url, sha256=sha256))


def test_says_what_was_tried(cache, monkeypatch):
    # a closed port stands for a machine without a network
    published(monkeypatch, "https://127.0.0.1:9/weights.pth")
    with pytest.raises(DigitError) as caught:
        load_inception("auto")
    message = str(caught.value)
    assert "https://127.0.0.1:9/weights.pth could not be reached" in message
    assert str(cache / "inception-2015-12-05-features.safetensors") in message
    assert "Fetch weights.pth on a machine that reaches it, and give its path" in message
    with pytest.raises(DigitError, match=r"There are no weights at .*inception-2015-12-05-features\.safetensors"):
        load_inception("wheel")
    with pytest.raises(DigitError, match=r"hf://someone/model/weights\.pth could not be had from the Hub"):
        load_inception("hf://someone/model/weights.pth")
    assert not any(cache.iterdir()) if cache.exists() else True


@pytest.fixture
def server(tmp_path):
    """A folder served at a local address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_the_public_file_is_fetched_checked_and_cached(random_inception, server, cache, monkeypatch):
    folder, address = server
    torch.save(random_inception.tensors, folder / "weights.pth")
    published(monkeypatch, f"{address}/weights.pth")
    with pytest.raises(DigitError, match=r"weights\.pth sent another file than expected"):
        load_inception("public")
    assert not list(cache.glob("*"))
    published(monkeypatch, f"{address}/weights.pth", sha256_of(folder / "weights.pth"))
    found = load_inception("public")
    assert (found.sha256, found.has_head) == (random_inception.sha256, True)
    assert [file.name for file in cache.iterdir()] == ["inception-2015-12-05.safetensors"]
    (folder / "weights.pth").unlink()
    assert load_inception("auto").sha256 == found.sha256
    with pytest.raises(DigitError, match=r"none\.pth could not be reached \(File not found\)"):
        download(f"{address}/none.pth", cache / "none.pth", "0")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_weights_are_refused(tmp_path, suffix):
    tensors = {"conv.weight": torch.zeros(3)}
    path = tmp_path / f"other{suffix}"
    torch.save(tensors, path) if suffix == ".pth" else write_tensors(path, tensors)
    with pytest.raises(DigitError, match="470 of 470 tensors are missing or of another shape"):
        load_inception(path)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(DigitError, match=r"bad.pth could not be read as weights"):
        load_inception(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_missing_file_and_unknown_backend(random_inception, tmp_path):
    with pytest.raises(DigitError, match="There are no weights at"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(DigitError, match="Backend 'tpu' was given"):
        open_extractor(random_inception, backend="tpu")


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "Grey images must be repeated"),
        (torch.zeros(2, 3, 8, 8), "torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"expected \(B, 3, H, W\) uint8 RGB"),
    ],
)
def test_wrong_images_are_explained(random_inception, images, hint):
    with pytest.raises(DigitError, match=hint):
        TorchExtractor(random_inception)(images)
