import json
import math

import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.evaluation.metrics.probe import ProbeOptions, split_off
from digit.evaluation.model_source import open_images
from digit.evaluation.studies.ranking import RankingOptions, candidates, rank
from digit.evaluation.studies.stages import Stages

OPTIONS = RankingOptions(
    steps=60,
    batch_size=32,
    dim=32,
    depth=2,
    heads=2,
    probe=ProbeOptions(epochs=20, lrs=(4.0,), standardize=True, neighbours=0),
)


def test_candidates_are_named_by_what_they_are(pipe, vq_pipe, cifar512, tmp_path):
    images = open_images(cifar512, num=64)
    stages = Stages(tmp_path, images, images, given_device="cpu")
    found = candidates({"a": pipe, "b": vq_pipe}, [], stages)
    assert {name: c.space for name, c in found.items()} == {"a, K = 12": "semantic", "b, 20 VQ codes": "vq"}
    fitted = candidates({"a": pipe}, [4, 9], stages)
    assert [c.codebook.config.clusters for c in fitted.values()] == [4, 9]
    with pytest.raises(DigitError, match="no encoder"):
        candidates({"b": vq_pipe}, [4], stages)
    with pytest.raises(DigitError, match="makes no tokens"):
        candidates({"c": pipe.with_parts(codebook=None, vqgan=None)}, [], stages)


def test_constant_tokens_come_last(pipe, cifar512, tmp_path, monkeypatch):
    """Constant tokens carry nothing: they must cost nothing to predict, know nothing, and come last."""
    train, test = split_off(open_images(cifar512), 0.25)
    stages = Stages(tmp_path, train, test, given_device="cpu")
    (constant,) = candidates({"constant": pipe}, [2], stages).values()
    constant.codebook.centroids.data[1] = 1e6  # nothing is near it
    entries = {"constant": constant, **candidates({"real": pipe}, [], stages)}
    ranking = rank(entries, stages, OPTIONS).save(tmp_path)
    lines = ranking.values
    assert [line["name"] for line in lines] == ["real, K = 12", "constant"]
    real, nothing = lines
    assert nothing["middle"] < 0.16 < real["middle"]
    assert nothing["nats_per_token"] < 0.1 < 1 < real["nats_per_token"]
    assert real["bits_per_image"] == pytest.approx(16 * real["nats_per_token"] / math.log(2))
    assert 0 < real["saved"] < nothing["saved"] <= 1
    assert len(real["probe"]) == OPTIONS.depth + 1
    assert json.loads((tmp_path / "result.json").read_text())["values"] == lines
    assert Image.open(tmp_path / "screen.png").width > 1200
    monkeypatch.setattr("digit.evaluation.studies.stages.train", lambda *_: pytest.fail("done twice"))
    assert rank(entries, stages, OPTIONS).values == lines
