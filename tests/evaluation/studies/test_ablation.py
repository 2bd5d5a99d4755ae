import json
import math

import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.evaluation.metrics.probe import ProbeOptions, split_off
from digit.evaluation.model_source import open_images
from digit.evaluation.studies.ablation import Candidate, ScreenOptions, candidates, screen_record

OPTIONS = ScreenOptions(
    steps=60,
    batch_size=32,
    dim=32,
    depth=2,
    heads=2,
    probe=ProbeOptions(epochs=20, lrs=(4.0,), standardize=True, neighbours=0),
)


def test_candidates_are_named_by_what_they_are(pipe, vq_pipe, cifar512):
    images = open_images(cifar512, num=64)
    found = candidates({"a": pipe, "b": vq_pipe}, [], images)
    assert [(c.name, c.pipe.space) for c in found] == [("a, K = 12", "semantic"), ("b, 20 VQ codes", "vq")]
    fitted = candidates({"a": pipe}, [4, 9], images)
    assert [c.pipe.codebook.config.clusters for c in fitted] == [4, 9]
    with pytest.raises(DigitError, match="no encoder"):
        candidates({"b": vq_pipe}, [4], images)
    with pytest.raises(DigitError, match="makes no tokens"):
        candidates({"c": pipe.with_parts(codebook=None, vqgan=None)}, [], images)


def test_screening_ranks_tokens(pipe, cifar512, tmp_path, monkeypatch):
    """Constant tokens carry nothing: they must cost nothing to predict, know nothing, and come last."""
    train, test = split_off(open_images(cifar512), 0.25)
    (constant,) = candidates({"constant": pipe}, [2], train)
    constant.pipe.codebook.centroids.data[1] = 1e6  # nothing is near it
    entries = [Candidate("constant", constant.pipe), Candidate("real", candidates({"real": pipe}, [], train)[0].pipe)]
    _, lines = screen_record(entries, train, test, tmp_path, OPTIONS, device="cpu")
    assert [line["name"] for line in lines] == ["real", "constant"]
    real, nothing = lines
    assert nothing["middle"] < 0.16 < real["middle"]
    assert nothing["nats_per_token"] < 0.1 < 1 < real["nats_per_token"]
    assert real["bits_per_image"] == pytest.approx(16 * real["nats_per_token"] / math.log(2))
    assert 0 < real["saved"] < nothing["saved"] <= 1
    assert len(real["probe"]) == OPTIONS.depth + 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["values"] == lines
    assert Image.open(tmp_path / "screen.png").width > 1200
    monkeypatch.setattr("digit.evaluation.studies.ablation.screen_one", lambda *_: pytest.fail("done twice"))
    assert screen_record(entries, train, test, tmp_path, OPTIONS)[1] == lines
