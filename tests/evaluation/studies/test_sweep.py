import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from digit.core.errors import DigitError
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
from digit.evaluation.model_source import SamplingRun, image_batches, open_images
from digit.evaluation.studies.points import Reference
from digit.evaluation.studies.sweep import parse_axes, parse_settings, plan, sweep, table_csv

OPTIONS = FidelityOptions(metrics=("fid", "isc", "prc"), isc_splits=2, batch_size=16)


@pytest.fixture
def run(pipe):
    return SamplingRun(pipe, 20, seed=1, batch_size=10)


def points_of(*arguments):
    return sweep(*arguments).values["points"]


def test_axes_are_read_as_yaml():
    assert parse_axes(["top_k=0,50", "cfg-schedule=linear,cosine", "temperature=0.9,1"]) == {
        "top_k": [0, 50],
        "cfg_schedule": ["linear", "cosine"],
        "temperature": [0.9, 1],
    }
    for wrong in (["top_k"], ["=1"], ["top_k="], ["top_k=1", "top_k=2"], []):
        with pytest.raises(DigitError, match="--vary"):
            parse_axes(wrong)


def test_settings_that_stay_have_one_value():
    assert parse_settings(["top_k=5", "cfg_schedule=linear"]) == {"top_k": 5, "cfg_schedule": "linear"}
    assert parse_settings([]) == {}
    with pytest.raises(DigitError, match="--set top_k was given several"):
        parse_settings(["top_k=5,6"])
    with pytest.raises(DigitError, match="--set 'top_k'"):
        parse_settings(["top_k"])


def test_plan_takes_one_axis_at_a_time_or_all_combinations():
    axes = {"top_k": [0, 5], "top_p": [0.5, 0.8, 1.0]}
    assert plan(axes) == [{"top_k": 0}, {"top_k": 5}, {"top_p": 0.5}, {"top_p": 0.8}, {"top_p": 1.0}]
    assert len(plan(axes, grid=True)) == 6
    assert plan(axes, grid=True)[1] == {"top_k": 0, "top_p": 0.8}


def test_a_point_is_the_fidelity_of_that_run(pipe, run, reference, pooling, cifar512, tmp_path):
    (found,) = points_of(run, {"top_k": [3]}, reference, tmp_path)
    pictures = pipe(labels=range(10), num=20, seed=1, top_k=3)
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    expected = fidelity([images], str(cifar512), extractor=pooling, options=OPTIONS)
    assert found["values"] == pytest.approx(expected.values, rel=1e-6)


def test_decoder_settings_share_the_priors_tokens(run, reference, tmp_path):
    points = points_of(run, {"decoder_top_k": [0, 4], "decoder_temperature": [0.5], "top_k": [2]}, reference, tmp_path)
    assert [point["prior_shared"] for point in points] == [False, True, True, False]
    assert len(list((tmp_path / "tokens").glob("*/tokens.npz"))) == 2
    assert len({point["values"]["fid"] for point in points}) == 4


def test_points_that_mean_the_same_are_measured_once(run, reference, tmp_path):
    points = points_of(run, {"top_p": [1.0, 0.5], "temperature": [1.0]}, reference, tmp_path)
    assert points[0]["values"] == points[2]["values"]
    assert len(list((tmp_path / "points").glob("*.json"))) == 2


def test_goes_on_where_it_stopped(run, reference, tmp_path, monkeypatch):
    axes = {"top_k": [2, 4, 8]}
    judged, judge = [], Reference.measure

    def stop_after_two(self, each, tokens, name):
        if len(judged) == 2:
            raise KeyboardInterrupt
        judged.append(name)
        return judge(self, each, tokens, name)

    monkeypatch.setattr(Reference, "measure", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        points_of(run, axes, reference, tmp_path)
    monkeypatch.setattr(Reference, "measure", lambda *given: judged.append("third") or judge(*given))
    points = points_of(run, axes, reference, tmp_path)
    assert judged == ["top k 2", "top k 4", "third"]
    fresh = points_of(run, axes, reference, tmp_path / "fresh")
    assert [p["values"] for p in points] == [p["values"] for p in fresh]


def test_another_sweep_in_the_same_folder_mixes_with_nothing(pipe, run, reference, tmp_path):
    first = points_of(run, {"top_k": [2]}, reference, tmp_path)
    other = points_of(SamplingRun(pipe, 10, seed=2), {"top_k": [2]}, reference, tmp_path)
    assert other[0]["values"] != first[0]["values"]
    assert points_of(run, {"top_k": [2]}, reference, tmp_path) == first


def test_nothing_is_sampled_where_a_point_is_impossible(run, reference, tmp_path):
    with pytest.raises(DigitError, match="top_p"):
        sweep(run, {"top_k": [2], "top_p": [0.5, 7]}, reference, tmp_path)
    assert not tmp_path.joinpath("points").exists()


@pytest.mark.parametrize("grid", [False, True])
def test_record(run, reference, tmp_path, grid):
    axes = {"top_k": [4, 0], "top_p": [0.5, 1.0]}
    found = sweep(run, axes, reference, tmp_path, grid).save(tmp_path)
    points = found.values["points"]
    assert json.loads((tmp_path / "result.json").read_text())["values"]["points"] == points
    assert found.plots == ("sweep.png",)
    width, height = Image.open(tmp_path / "sweep.png").size
    assert width > 1800
    assert (height > 1000) == (not grid)  # a row for each axis
    assert found.rows()[0]["Settings"] == ("top k 4, top p 0.5" if grid else "top k 4")
    assert found.rows()[0]["FID ↓"] == points[0]["values"]["fid"]
    with open(tmp_path / "sweep.csv", newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 4
    assert [float(line["fid"]) for line in lines] == [point["values"]["fid"] for point in points]
    assert (lines[0]["top_k"], lines[0]["top_p"]) == ("4", "0.5" if grid else "")


def test_missing_metrics_leave_empty_cells():
    points = [
        {"settings": {"a": 1}, "values": {"fid": 2.0}, "seconds": 1},
        {"settings": {}, "values": {}, "seconds": 3},
    ]
    assert table_csv({"a": [1]}, points) == "a,fid,seconds\n1,2.0,1\n,,3\n"


def test_references_are_measured_once_and_told_apart(cifar512, pooling):
    one = Reference.of(str(cifar512), pooling, OPTIONS)
    part = open_images(cifar512, num=100)
    batches = (batch.images for batch in image_batches(part, 32, 50, torch.uint8))
    other = Reference(measure(batches, pooling, OPTIONS.metrics, name=one.features.name), pooling, OPTIONS)
    assert one.describe() != other.describe()
    assert one.describe() == Reference.of(str(cifar512), pooling, OPTIONS).describe()
