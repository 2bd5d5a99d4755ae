import json
import sys

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from digit.clustering.kmeans import Reservoir, _kmeans, fit_codebook, quality
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.transforms import Transform
from digit.data.dataset import open_dataset
from digit.data.sampling import Batches, OrderedSampler
from digit.encoders import small_conv, weights_checksum
from digit.models.codebook import Codebook
from digit.pipeline.tokenizer import SemanticTokenizer


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return small_conv(widths=(8, 8, 16), blocks=(1, 1, 1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches(request):
    dataset = open_dataset(request.path.parents[1] / "assets" / "cifar512").subset(range(96))
    return list(Batches(dataset, OrderedSampler(len(dataset), 32), Transform(size=32, crop="none")))


def sampled(capacity: int, length: int, cuts: list[int], seed: int = 0) -> list[int]:
    """Which of the vectors 0, 1, 2, ... a reservoir keeps when the stream comes in pieces."""
    stream = np.arange(length, dtype=np.float32)[:, None]
    reservoir = Reservoir(capacity, 1, seed)
    for piece in np.split(stream, sorted({c for c in cuts if c < length})):
        reservoir.add(piece)
    assert reservoir.seen == length
    return reservoir.sample[:, 0].astype(int).tolist()


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 80), st.lists(st.integers(0, 80), max_size=6), st.integers(0, 9))
def test_reservoir_keeps_distinct_vectors_and_does_not_feel_batches(capacity, length, cuts, seed):
    kept = sampled(capacity, length, cuts, seed)
    assert len(kept) == len(set(kept)) == min(capacity, length)
    assert kept == sampled(capacity, length, [], seed)
    if length <= capacity:
        assert sorted(kept) == list(range(length))


@settings(deadline=None, max_examples=8)
@given(st.integers(2, 12), st.integers(13, 40), st.lists(st.integers(1, 40), max_size=4))
def test_reservoir_is_uniform(capacity, length, cuts):
    """Every vector, early or late, is kept as often as every other: chi-squared far from the tail."""
    runs = 1500
    counts = np.zeros(length)
    for seed in range(runs):
        counts[sampled(capacity, length, cuts, seed)] += 1
    share = capacity / length
    chi2 = ((counts - runs * share) ** 2 / (runs * share * (1 - share))).sum() * (length - 1) / length
    # mean length - 1, deviation sqrt(2 (length - 1)); six deviations is far beyond chance
    assert chi2 < length - 1 + 6 * np.sqrt(2 * (length - 1))


def test_kmeans_is_that_of_faiss():
    points = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32)
    whole = faiss.Kmeans(8, 40, niter=20, seed=3, min_points_per_centroid=1)
    whole.train(points)
    assert np.array_equal(_kmeans(points, 40, 20, 3, 256, show=False), whole.centroids)


def test_fitted_codebook_on_real_images(encoder, batches, tmp_path):
    book = fit_codebook(encoder, batches, 24, seed=1, provenance={"data": "abc"}, show=False)
    facts = book.provenance
    assert book.centroids.shape == (24, 16)
    assert facts["images"] == 96
    assert facts["vectors_seen"] == 96 * 64
    assert facts["vectors_used"] == min(96 * 64, 24 * 256)
    assert facts["encoder"]["checksum"] == weights_checksum(encoder)
    assert facts["preprocessing"] == to_dict(encoder.preprocessing)
    assert facts["data"] == "abc"
    assert facts["used_clusters"] + facts["dead_clusters"] == 24
    assert 1 <= facts["perplexity"] <= 24
    # against the mean of all features, clusters explain a good part
    features = torch.cat([encoder(b.images).flatten(0, 1) for b in batches])
    assert facts["inertia"] < 0.7 * (features - features.mean(0)).square().sum(1).mean().item()
    book.save_pretrained(tmp_path / "book")
    loaded = Codebook.from_pretrained(tmp_path / "book")
    assert loaded.provenance == json.loads(json.dumps(facts))
    assert torch.equal(loaded.centroids, book.centroids)
    # what was fitted is what tokenizing sees
    tokens = SemanticTokenizer(encoder, loaded).encode(batches[0].images)
    assert torch.equal(tokens, book.assign(encoder(batches[0].images)))


def test_fitting_depends_on_seed_and_images_alone(encoder, batches):
    images = torch.cat([b.images for b in batches])
    options = {"seed": 5, "iterations": 3, "max_points_per_centroid": 40, "show": False}
    first = fit_codebook(encoder, batches, 16, **options)
    assert first.provenance["vectors_used"] == 640
    assert torch.allclose(first.centroids, fit_codebook(encoder, images.split(7), 16, **options).centroids, atol=1e-4)
    assert not torch.allclose(
        first.centroids, fit_codebook(encoder, batches, 16, **options | {"seed": 6}).centroids, atol=1e-2
    )


def test_quality_by_hand():
    features = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 0]])
    centroids = torch.tensor([[0.0, 1], [10, 0], [99, 99]])
    facts = quality(features, centroids)
    assert facts["inertia"] == pytest.approx(0.5)
    assert (facts["used_clusters"], facts["dead_clusters"]) == (2, 1)
    assert facts["perplexity"] == pytest.approx(2.0)


def test_refusals(encoder, batches, monkeypatch):
    with pytest.raises(DigitError, match=r"128 feature vectors, fewer than the 200 clusters"):
        fit_codebook(encoder, [batches[0].images[:2]], 200, show=False)
    with pytest.raises(DigitError, match="fewer than the 4 clusters"):
        fit_codebook(encoder, [], 4, show=False)
    with pytest.raises(DigitError, match="at least 1"):
        fit_codebook(encoder, batches, 0)
    with pytest.raises(DigitError, match="not finite"):
        fit_codebook(encoder, [torch.full((1, 3, 32, 32), torch.nan)], 4, show=False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DigitError, match=r"pip install 'digit-ar\[train\]'"):
        fit_codebook(encoder, batches, 4, show=False)
