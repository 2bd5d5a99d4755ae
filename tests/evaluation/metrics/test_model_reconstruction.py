import json

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.evaluation.metrics.fidelity import fidelity
from digit.evaluation.metrics.reconstruction import Way, codebook_values, model_reconstruction
from digit.evaluation.model_source import open_images
from digit.evaluation.results import Result
from digit.pipeline.pipeline import Tokens


@pytest.fixture(scope="module")
def images(cifar512):
    return open_images(cifar512, num=40)


@pytest.fixture(scope="module")
def tensors(images):
    return torch.stack([to_tensor(images[i].image) for i in range(40)])


def as_bytes(x):
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def test_every_path_is_measured_as_by_hand(pipe, images, tensors, pooling):
    result = model_reconstruction(pipe, images, pooling, None, {"lpips": "left out."}, seed=4, batch_size=16)
    assert [row.name for row in result.values] == [
        "VQGAN alone",
        "semantic tokens, ar decoder",
        "semantic tokens, masked decoder",
    ]
    with torch.inference_mode():
        semantic = pipe.tokenizer.encode(tensors)
        expected = [
            pipe.to_pixels(Tokens(None, pipe.vqgan.encode(tensors))),
            pipe.decode(semantic, 4, "ar"),
            pipe.decode(semantic, 4, "masked"),
        ]
    for row, pictures in zip(result.values, expected, strict=True):
        pairs = list(zip(as_bytes(tensors).numpy(), as_bytes(pictures).numpy(), strict=True))
        psnr = np.mean([peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs])
        assert row.values["psnr"] == pytest.approx(psnr, abs=1e-3)
        rfid = fidelity([as_bytes(pictures)], [as_bytes(tensors)], extractor=pooling)
        assert row.values["rfid"] == pytest.approx(rfid.values["fid"], abs=1e-4)
        assert row.not_measured["lpips"] == "not measured: left out."
        assert row.images == 40


def test_use_of_the_codebook_and_entropy(pipe, images, tensors):
    rows = model_reconstruction(pipe, images, None, None, batch_size=16).values
    for row, tokens, codes in zip(
        rows, (pipe.vqgan.encode(tensors), *[pipe.tokenizer.encode(tensors)] * 2), (20, 12, 12), strict=True
    ):
        counts = np.bincount(tokens.flatten().numpy(), minlength=codes)
        assert row.values["usage"] == np.count_nonzero(counts) / codes
        assert row.values["entropy"] == pytest.approx(scipy.stats.entropy(counts, base=2), abs=1e-9)
    even = codebook_values(torch.tensor([3, 3, 3, 3, 0, 0, 0, 0]))
    assert even == {"usage": 0.5, "entropy": pytest.approx(2.0)}


def test_no_perturbation_is_the_plain_path(pipe, tensors):
    numbers = range(40)
    plain = Way(pipe, "vq", 0, 5)(tensors, numbers)
    assert torch.equal(plain, as_bytes(pipe.to_pixels(Tokens(None, pipe.vqgan.encode(tensors)))))
    plain = Way(pipe, "semantic", 0, 5)(tensors, numbers)
    assert torch.equal(plain, as_bytes(pipe.decode(pipe.tokenizer.encode(tensors))))


def test_pfid_is_the_mean_over_shares_and_neighbourhoods(pipe, images, tensors, pooling):
    how = {"perturb": True, "shares": (0.1, 0.9), "neighbourhoods": (0.2, 1.0)}
    vq, semantic = model_reconstruction(pipe, images, pooling, None, **how).perturbed
    assert (vq["space"], semantic["space"]) == ("vq", "semantic")
    assert [(p["neighbours"], p["share"]) for p in vq["points"]] == [(4, 0.1), (4, 0.9), (20, 0.1), (20, 0.9)]
    for row in (vq, semantic):
        for point in row["points"]:
            path = Way(pipe, row["space"], point["share"], point["neighbours"])
            expected = fidelity([path(tensors, range(40))], [as_bytes(tensors)], extractor=pooling).values["fid"]
            assert point["fid"] == pytest.approx(expected, abs=1e-3)
        assert row["pfid"] == pytest.approx(np.mean([p["fid"] for p in row["points"]]))
    # a token that is drawn from the whole codebook is noise: nine tenths of it are further from the image than one
    # tenth
    few, many = (Way(pipe, "vq", share, 20)(tensors, range(40)) for share in (0.1, 0.9))
    plain = Way(pipe, "vq", 0, 20)(tensors, range(40)).float()
    assert 0 < (few - plain).abs().mean() < (many - plain).abs().mean()


def test_record(pipe, images, pooling, tmp_path):
    how = {"perturb": True, "shares": (0.5, 0.9), "neighbourhoods": (0.1, 0.5)}
    found = model_reconstruction(pipe, images, pooling, None, **how).save(tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["values"]["rfid"] for row in result["values"]] == [row.values["rfid"] for row in found.values]
    assert result["settings"]["perturbation"] == found.perturbed
    assert result["paper"]["VQ only"] == 1.67
    assert Image.open(tmp_path / "perturbation.png").width > 1200
    assert Result.load(tmp_path / "result.json").rows() == found.rows()


def test_baseline_and_missing_parts(vq_pipe, pipe, images):
    assert [row.name for row in model_reconstruction(vq_pipe, images, None, None).values] == ["VQGAN alone"]
    with pytest.raises(DigitError, match="no vqgan"):
        model_reconstruction(pipe.with_parts(vqgan=None), images, None, None)
    with pytest.raises(DigitError, match="needs the FID network: no network"):
        model_reconstruction(pipe, images, None, None, {"rfid": "no network"}, perturb=True)
