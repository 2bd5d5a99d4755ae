import json

import pytest
import torch
from PIL import Image

import tiny
from digit.core.errors import DigitError
from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.studies.points import Reference, replaced, robustness

OPTIONS = FidelityOptions(metrics=("fid",))


def test_what_is_replaced_depends_on_seed_image_and_rate_alone():
    tokens = torch.randint(0, 12, (40, 16), generator=torch.Generator().manual_seed(0))
    half = replaced(tokens, 0.5, 12, range(40), seed=3)
    assert 0.4 < (half != tokens).float().mean() < 0.6
    assert (replaced(tokens, 1.0, 12, range(40), 3) != tokens).all()  # never by itself
    assert torch.equal(replaced(tokens, 0.0, 12, range(40), 3), tokens)
    assert half.min() >= 0
    assert half.max() < 12
    assert torch.equal(replaced(tokens[10:20], 0.5, 12, range(10, 20), 3), half[10:20])
    assert not torch.equal(replaced(tokens, 0.5, 12, range(40), 4), half)
    less = replaced(tokens, 0.2, 12, range(40), 3)
    moved = less != tokens
    assert torch.equal(less[moved], half[moved])  # whatever changed at a lower rate changed likewise


def test_each_decoder_at_each_rate(pipe, reference, pooling, cifar512, tmp_path):
    run = SamplingRun(pipe, 20, seed=1, batch_size=8)
    found = robustness(run, reference, tmp_path, rates=(0.5, 0.0)).save(tmp_path)
    assert [curve["decoder"] for curve in found.values] == ["ar", "masked"]
    for curve in found.values:
        whole, half = curve["points"]
        assert (whole["rate"], whole["vq"], whole["pixels"]) == (0, 1, 0)
        assert half["vq"] < 1
        assert half["pixels"] > 0
    free = SamplingRun(pipe, 20, seed=1, decoder="masked")
    expected = fidelity(free.batches(), str(cifar512), extractor=pooling, options=OPTIONS)
    assert found.values[1]["points"][0]["values"] == pytest.approx(expected.values, rel=1e-6)
    assert len(list((tmp_path / "tokens").glob("*.json"))) == 1  # both decoders get the tokens of one prior
    assert [row["Replaced tokens"] for row in found.rows()] == ["0%", "50%"] * 2
    told = json.loads((tmp_path / "result.json").read_text())["provenance"]
    for fact in ("masked decoder: 20 generated images", "labels all in turns", "InceptionV3, weights 000"):
        assert fact in told
    assert Image.open(tmp_path / "robustness.png").width > 1000


def test_goes_on_where_it_stopped(pipe, reference, tmp_path, monkeypatch):
    run = SamplingRun(pipe, 8)
    first = robustness(run, reference, tmp_path, ["ar"], [0.3]).values
    monkeypatch.setattr(Reference, "measure", lambda *_: pytest.fail("measured twice"))
    assert robustness(run, reference, tmp_path, ["ar"], [0.3]).values == first


def test_decoders_without_vq_tokens_have_pixels_alone(pipe, reference, tmp_path):
    pipe = pipe.with_parts(decoders={"onepass": tiny.onepass()})
    found = robustness(SamplingRun(pipe, 8), reference, tmp_path, rates=[0.5])
    (point,) = found.values[0]["points"]
    assert point["vq"] is None
    assert point["pixels"] > 0
    assert len(found.figure().axes) == 2  # FID and pixels


def test_what_cannot_be_measured(pipe, vq_pipe, reference, tmp_path):
    with pytest.raises(DigitError, match="from 0 to 1"):
        robustness(SamplingRun(pipe, 8), reference, tmp_path, rates=[1.5])
    with pytest.raises(DigitError, match="no decoder to compare"):
        robustness(SamplingRun(vq_pipe, 8), reference, tmp_path)
    with pytest.raises(DigitError, match="onepass"):
        robustness(SamplingRun(pipe, 8), reference, tmp_path, ["onepass"])
