"""``digit serve`` before it serves, and ``digit atlas``. The running server is in tests/web."""

import pytest

from digit.clustering.patches import FILE, Atlas
from digit.pipeline.pipeline import DigitPipeline
from digit.web.service import open_atlas
from terminal import run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--auth", "me"], "--auth needs the form USER:PASSWORD"),
        (["--auth", ":secret"], "--auth needs the form USER:PASSWORD"),
        (["--share"], "it needs --auth"),
    ],
)
def test_mistakes_get_a_sentence(model, monkeypatch, capsys, words, message):
    monkeypatch.delenv("DIGIT_AUTH", raising=False)
    assert run(monkeypatch, "serve", model, *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_atlas(model, cifar512, monkeypatch, capsys):
    pipe = DigitPipeline.from_folder(model)
    assert open_atlas(model, pipe) is None
    try:
        assert run(monkeypatch, "atlas", model, "--data", cifar512, "--num", 40, "--each", 3, "--device", "cpu") == 0
        atlas = open_atlas(model, pipe)
        assert isinstance(atlas, Atlas)
        assert (atlas.images, atlas.source) == (40, "cifar512 (train)")
        assert f"of {len(atlas.counts)} clusters, from 40 images" in " ".join(capsys.readouterr().out.split())
        shapes = {atlas.patches(cluster).shape for cluster in range(len(atlas.counts))}
        assert {shape[1:] for shape in shapes} == {(24, 24, 3)}
        assert max(shape[0] for shape in shapes) == 3
    finally:
        (model / "codebook" / FILE).unlink(missing_ok=True)
