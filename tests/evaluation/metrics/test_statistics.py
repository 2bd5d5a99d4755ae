import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics

from digit.core.errors import DigitError
from digit.evaluation.metrics.statistics import (
    FeatureFile,
    FeatureStatistics,
    Moments,
    load_set,
    save_statistics,
)


def gathered(rows, sizes):
    moments = Moments()
    for part in rows.split(sizes):
        moments.update(part)
    return moments.statistics()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 3


def test_equals_torch_fidelitys_statistics(rows):
    found, expected = gathered(rows, [64, 64, 64, 8]), fid_features_to_statistics(rows.double())
    np.testing.assert_allclose(found.mu, expected["mu"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.sigma, expected["sigma"], rtol=0, atol=1e-11)
    assert found.n == 200


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), seed=st.integers(0, 1000))
def test_batches_and_order_do_not_matter(rows, cuts, seed):
    edges = [0, *sorted(cuts), 200]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    found = gathered(rows[order], [b - a for a, b in pairwise(edges)])
    expected = gathered(rows, [200])
    assert np.abs(found.mu - expected.mu).max() < 1e-10
    assert np.abs(found.sigma - expected.sigma).max() < 1e-10


def test_stays_exact_far_from_zero(rows):
    # sums of squares would lose every digit of the covariance here
    far = rows.double() + 1e8
    np.testing.assert_allclose(gathered(far, [7] * 28 + [4]).sigma, np.cov(far.numpy(), rowvar=False), atol=1e-5)


def test_too_few_rows():
    moments = Moments()
    moments.update(torch.zeros(1, 4))
    with pytest.raises(DigitError, match=r"1 image\(s\) were given.*at least 2"):
        moments.statistics()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_features_name_the_image(rows, bad):
    moments = Moments()
    moments.update(rows[:10])
    broken = rows[10:20].clone()
    broken[3, 5] = bad
    with pytest.raises(DigitError, match=r"features of image 13 hold NaN or infinity \(1 of 10"):
        moments.update(broken)
    assert moments.n == 10


def test_other_width(rows):
    moments = Moments()
    moments.update(rows)
    with pytest.raises(DigitError, match="expected rows of width 16"):
        moments.update(rows[:, :8])


def test_round_trip_keeps_every_bit(tmp_path, rows):
    statistics = gathered(rows, [200])
    statistics.metadata.update(tool="torch-fidelity 0.4.0", source="rows")
    read = load_set(save_statistics(tmp_path / "made" / "rows.npz", statistics)).statistics
    assert np.array_equal(read.mu, statistics.mu)
    assert np.array_equal(read.sigma, statistics.sigma)
    assert read.n == 200
    assert read.metadata["source"] == "rows"
    assert len(read.metadata["file_sha256"]) == 64


def test_reads_the_adm_layout(tmp_path):
    mu, sigma = np.arange(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    read = load_set(tmp_path / "adm.npz")
    assert read.statistics.n is None
    assert read.statistics.mu.dtype == read.spatial.sigma.dtype == np.float64
    assert np.array_equal(read.statistics.mu, mu)
    assert np.array_equal(read.spatial.sigma, sigma)


def test_compact_files_are_small_and_near(tmp_path, rows):
    whole = gathered(rows, [200])
    read = load_set(save_statistics(tmp_path / "c.npz", whole, compact=True))
    assert np.abs(read.statistics.sigma - whole.sigma).max() < 2e-5 * np.abs(whole.sigma).max()
    assert np.array_equal(read.statistics.sigma, read.statistics.sigma.T)
    assert (read.statistics.n, read.spatial) == (200, None)


def broken_files(folder):
    eye = np.eye(3)
    np.savez(folder / "other.npz", arr_0=eye)
    np.savez(folder / "shapes.npz", mu=np.zeros(4), sigma=eye)
    np.savez(folder / "nan.npz", mu=np.full(3, np.nan), sigma=eye)
    np.savez(folder / "pickle.npz", mu=np.array([{"a": 1}], dtype=object), sigma=eye)
    np.save(folder / "array.npy", eye)
    np.savez(folder / "whole.npz", mu=np.zeros(200), sigma=np.eye(200))
    (folder / "cut.npz").write_bytes((folder / "whole.npz").read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.npz", "no statistics file"),
        ("other.npz", r"holds the arrays \['arr_0'\]; expected 'mu' and 'sigma'"),
        ("shapes.npz", r"mu \(4,\) and sigma \(3, 3\)"),
        ("nan.npz", "NaN or infinity"),
        ("pickle.npz", "not a readable .npz"),
        ("array.npy", "not an .npz file"),
        ("cut.npz", "not an .npz file"),
    ],
)
def test_unusable_files_are_explained(tmp_path, name, sentence):
    broken_files(tmp_path)
    with pytest.raises(DigitError, match=sentence):
        load_set(tmp_path / name)


def test_features_are_kept_where_asked(tmp_path, rows):
    statistics = gathered(rows, [200])
    assert load_set(save_statistics(tmp_path / "s.npz", statistics), features=True).features is None
    path = save_statistics(tmp_path / "f.npz", statistics, rows.float())
    assert torch.equal(load_set(path, features=True).features, rows.float())
    assert load_set(path).features is None
    assert np.array_equal(load_set(path).statistics.mu, statistics.mu)


@pytest.mark.parametrize(
    "features",
    [np.zeros((5, 3), np.float32), np.zeros((5, 4)), np.full((5, 4), np.nan, np.float32), np.array([{}], dtype=object)],
    ids=["width", "float64", "nan", "pickle"],
)
def test_features_that_do_not_fit_are_refused(tmp_path, features):
    np.savez(tmp_path / "f.npz", mu=np.zeros(4), sigma=np.eye(4), features=features)
    with pytest.raises(DigitError, match=r"f\.npz"):
        load_set(tmp_path / "f.npz", features=True)


def test_metadata_is_json_text_not_a_pickle(tmp_path):
    path = save_statistics(tmp_path / "s.npz", FeatureStatistics(np.zeros(2), np.eye(2), 5, {"tool": "t"}))
    with np.load(path, allow_pickle=False) as arrays:
        assert json.loads(str(arrays["metadata"])) == {"tool": "t"}
        assert {name: arrays[name].dtype.kind for name in arrays.files} == {
            "mu": "f",
            "sigma": "f",
            "n": "i",
            "metadata": "U",
        }


def test_feature_file_returns_all_rows(rows):
    file = FeatureFile()
    for part in rows.split(33):
        file.append(part)
    assert torch.equal(file.read(), rows)
