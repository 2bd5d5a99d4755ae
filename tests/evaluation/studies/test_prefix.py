import json

import pytest
from PIL import Image

from digit.core.errors import DigitError
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
from digit.evaluation.model_source import SamplingRun, open_images
from digit.evaluation.studies.points import Reference, as_runs, prefix

OPTIONS = FidelityOptions(metrics=("fid", "isc"), isc_splits=2)


@pytest.fixture(scope="module")
def images(cifar512):
    return open_images(cifar512, num=24)


def points_of(run, *arguments):
    return prefix({"tiny": run}, *arguments).values[0]["points"]


def test_ends_are_generation_and_reconstruction(pipe, images, reference, pooling, cifar512, tmp_path):
    points = points_of(SamplingRun(pipe, 1, seed=2), images, reference, tmp_path, [0, 0.5, 1])
    assert [point["given"] for point in points] == [0, 8, 16]
    free = SamplingRun(pipe, 24, seed=2, labels=images.labels.tolist())
    expected = fidelity(free.batches(), str(cifar512), extractor=pooling, options=OPTIONS)
    assert points[0]["values"] == pytest.approx(expected.values, rel=1e-6)
    pictures = [images[i].image for i in range(24)]
    back = pipe.decode(pipe.tokenizer.encode(pictures), seed=2)
    whole = measure([(back * 255).round().byte()], pooling, OPTIONS.metrics)
    expected = fidelity([(back * 255).round().byte()], str(cifar512), extractor=pooling, options=OPTIONS)
    assert whole.statistics.n == 24
    assert points[2]["values"] == pytest.approx(expected.values, rel=1e-6)


def test_goes_on_where_it_stopped(pipe, images, reference, tmp_path, monkeypatch):
    run = SamplingRun(pipe, 1)
    first = points_of(run, images, reference, tmp_path, [0.5])
    monkeypatch.setattr(Reference, "measure", lambda *_: pytest.fail("measured twice"))
    assert points_of(run, images, reference, tmp_path, [0.5]) == first
    with pytest.raises(pytest.fail.Exception, match="measured twice"):  # another seed is another measurement
        points_of(SamplingRun(pipe, 1, seed=9), images, reference, tmp_path, [0.5])


def test_record_of_model_and_baseline(pipe, vq_pipe, images, reference, tmp_path):
    found = prefix(as_runs([pipe, vq_pipe], seed=1), images, reference, tmp_path, [1, 0.25]).save(tmp_path)
    assert [curve["name"] for curve in found.values] == ["tiny", "tiny-vq"]
    assert [row["Given"] for row in found.rows()] == ["25.0%", "100.0%"] * 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(c["space"], [p["share"] for p in c["points"]]) for c in result["values"]] == [
        ("semantic", [0.25, 1]),
        ("vq", [0.25, 1]),
    ]
    assert {run["num"] for run in result["settings"]["runs"].values()} == {24}
    assert Image.open(tmp_path / "prefix.png").width > 1000


def test_names_do_not_collide(pipe):
    assert list(as_runs([pipe, pipe])) == ["tiny", "tiny-2"]


def test_shares_out_of_range(pipe, images, reference, tmp_path):
    with pytest.raises(DigitError, match="from 0 to 1"):
        points_of(SamplingRun(pipe, 1), images, reference, tmp_path, [0.5, 1.5])
