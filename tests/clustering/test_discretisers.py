"""Each discretiser against a plain reference in numpy, scikit-learn or scipy, on features of real images."""

import math

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

import tiny
from digit.clustering.discretisers import Discretisation, fsq_levels, moments, spherical
from digit.clustering.kmeans import KMeans, fit_codebook
from digit.clustering.patches import build_atlas
from digit.clustering.streams import Points, Vectors
from digit.core.errors import DigitError
from digit.data.dataset import open_dataset
from digit.evaluation.model_source import image_batches
from digit.models.codebook import Codebook, nearest
from digit.pipeline.pipeline import DigitPipeline

K = 24


@pytest.fixture(scope="module")
def images(cifar512):
    return torch.cat([batch.images for batch in image_batches(open_dataset(cifar512).subset(range(96)), 32, 32)])


@pytest.fixture(scope="module")
def features(encoder, images):
    return encoder(images).flatten(0, 1)  # (6144, 16)


@pytest.fixture(scope="module")
def vectors(features):
    """In parts, as a stream gives them, and a random order of them to begin with."""
    numbers = torch.arange(len(features))
    shuffled = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]
    parts = [Points(n, x) for n, x in zip(numbers.split(500), features.split(500), strict=True)]
    return Vectors(lambda _: parts, shuffled)


def axes(features, count):
    """Mean and directions (count, D) by numpy's own decomposition of the whole matrix."""
    x = features.double().numpy()
    return x.mean(0), np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:count]


def test_moments_of_a_stream_are_those_of_the_matrix(vectors, features):
    mean, covariance = moments(vectors)
    assert np.allclose(mean, features.double().numpy().mean(0), atol=1e-6)
    assert np.allclose(covariance, np.cov(features.double().numpy().T, bias=True), atol=1e-5)


@pytest.mark.parametrize("kind", ["kmeans", "spherical", "residual"])
def test_principal_components_are_carried_back(kind, vectors, features):
    """A codebook in the full width gives the tokens of the same centroids in the small space."""
    plain = KMeans(K, show=False)
    book = Discretisation(kind=kind, pca=5, depth=2)(plain, vectors)
    mean, directions = axes(features, 5)
    small = torch.from_numpy((features.double().numpy() - mean) @ directions.T).float()
    spread = np.square(features.double().numpy() - mean).sum()
    assert book.provenance["pca"]["variance"] == pytest.approx(float(small.double().square().sum()) / spread, rel=1e-5)
    tables = [torch.from_numpy(table.double().numpy() @ directions.T).float() for table in book.tables]
    tables[0] = tables[0] - torch.from_numpy(mean @ directions.T).float()
    inside = Codebook.from_centroids(torch.cat(tables), depth=book.config.depth)
    assert float((inside.assign(small) == book.assign(features)).float().mean()) > 0.999  # but for near ties
    # and the centroids lie in the plane of the components
    offset = book.tables[0].double().numpy() - mean
    assert np.allclose(offset @ directions.T @ directions, offset, atol=1e-5)


def test_all_components_find_what_plain_kmeans_does(vectors, features):
    whole = Discretisation(pca=features.shape[1])(KMeans(K, show=False), vectors)
    plain = KMeans(K, show=False).fit(vectors)
    assert torch.allclose(whole.centroids, plain.centroids, atol=1e-3)
    assert whole.provenance["inertia"] == pytest.approx(plain.provenance["inertia"], rel=1e-4)
    assert whole.provenance["pca"] == {"components": 16, "variance": pytest.approx(1)}
    quarter = Discretisation(kind="pca")(KMeans(K, show=False), vectors)
    assert quarter.provenance["pca"]["components"] == 4
    assert quarter.provenance["inertia"] > plain.provenance["inertia"]


def test_spherical_kmeans_against_numpy(vectors, features):
    """Lloyd's iterations over angles by hand; then the tokens are those of the largest cosine."""
    book = spherical(KMeans(K, iterations=6, show=False), vectors)
    x = features.double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    c = vectors.first[:K].double().numpy()
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    for _ in range(6):
        ids = (x @ c.T).argmax(1)
        assert len(set(ids)) == K  # none is empty, or both would need the same rule for it
        c = np.stack([x[ids == k].mean(0) for k in range(K)])
        c /= np.linalg.norm(c, axis=1, keepdims=True)
    lengths = book.centroids.norm(dim=1)
    assert torch.allclose(lengths, lengths.mean().expand(K), rtol=1e-5)
    assert np.allclose((book.centroids / lengths[:, None]).numpy(), c, atol=1e-4)
    assert float((book.assign(features) == torch.from_numpy((x @ c.T).argmax(1))).float().mean()) > 0.999
    # no other length is nearer to the vectors
    for factor in (0.98, 1.02):
        other = book.lookup(book.assign(features)) * factor
        assert (features - other).square().sum(1).mean() > book.provenance["inertia"]


def test_residual_kmeans_against_scipy(vectors, features):
    book = Discretisation(kind="residual", depth=3)(KMeans(K, iterations=5, show=False), vectors)
    rest, first, tokens, total = features.numpy(), vectors.first[:K].numpy(), [], 0
    for table in book.tables:
        theirs, _ = kmeans2(rest, first, iter=5, minit="matrix")
        assert np.allclose(table.numpy(), theirs, atol=1e-3)
        tokens.append(nearest(torch.from_numpy(rest), table))
        first = first - theirs[nearest(torch.from_numpy(first), torch.from_numpy(theirs))]
        rest, total = rest - table[tokens[-1]].numpy(), total + table[tokens[-1]]
    assert torch.equal(book.assign(features), torch.stack(tokens, -1))
    assert torch.allclose(book.lookup(book.assign(features)), total, atol=1e-6)
    assert book.provenance["inertia"] == pytest.approx(float(np.square(rest).sum(1).mean()), rel=1e-4)
    assert book.provenance["used_clusters"] == sum(len(set(one.tolist())) for one in tokens)
    assert book.assign(features.view(96, 64, 16)).shape == (96, 64, 3)


def test_fsq_against_rounding(vectors, features):
    """The grid's nearest point is what rounding each component by itself gives."""
    book = Discretisation(kind="fsq")(KMeans(K, show=False), vectors)
    levels = book.provenance["levels"]
    assert (levels, book.config.clusters, book.config.depth) == ([24], 24, 1)
    book = Discretisation(kind="fsq")(KMeans(256, show=False), vectors)
    levels = np.array(book.provenance["levels"])
    assert (levels.tolist(), book.config.clusters) == ([7, 6, 6], 252)
    mean, directions = axes(features, 3)
    small = (features.double().numpy() - mean) @ directions.T
    step = 4 * small.std(0) / levels
    ids = np.clip(np.round(small / step + (levels - 1) / 2), 0, levels - 1)
    found = (book.lookup(book.assign(features)).double().numpy() - mean) @ directions.T
    close = np.isclose(found, (ids - (levels - 1) / 2) * step, atol=1e-3).all(1)
    assert close.mean() > 0.999  # but for near ties


@pytest.mark.parametrize("clusters", [1, 4, 5, 24, 64, 256, 1000, 1024, 4096, 16384])
def test_levels_of_fsq(clusters):
    levels = fsq_levels(clusters)
    assert clusters * 0.8 < math.prod(levels) <= clusters
    assert max(levels) - min(levels) <= 1
    assert clusters < 25 or min(levels) >= 5


@pytest.mark.parametrize("mode", ["sample", "whole", "mini-batch"])
def test_fitted_from_images(mode, encoder, images, features, tmp_path):
    """Through the encoder, saved and loaded; facts of the encoder and of the way of discretising stand together."""
    kind = Discretisation(kind="residual", pca=8, depth=2)
    book = fit_codebook(encoder, lambda _: images.split(32), K, mode=mode, discretiser=kind, iterations=3, show=False)
    book.save_pretrained(tmp_path / "book")
    loaded = Codebook.from_pretrained(tmp_path / "book")
    assert (loaded.config.clusters, loaded.config.depth, tuple(loaded.centroids.shape)) == (K, 2, (2 * K, 16))
    assert torch.equal(loaded.assign(features), book.assign(features))
    facts = loaded.provenance
    assert (facts["kind"], facts["pca"]["components"], facts["encoder"]["dim"]) == ("residual", 8, 16)
    assert facts["vectors_used"] == len(features)
    inertia = float((features - book.lookup(book.assign(features))).square().sum(1).mean())
    assert facts["inertia"] == pytest.approx(inertia, rel=0.02)


def test_residual_tokens_lie_side_by_side_in_ranges_of_their_own(encoder, images, tmp_path):
    book = Codebook.from_centroids(torch.randn(2 * tiny.CLUSTERS, 16), depth=2)
    pipe = DigitPipeline(encoder=encoder, codebook=book)
    rows, columns = encoder.grid
    assert (pipe.tokenizer.grid, pipe.tokenizer.vocab_size) == ((rows, 2 * columns), 2 * tiny.CLUSTERS)
    tokens = pipe.tokenizer.encode(images[:3])  # (3, 2 N)
    apart = tokens.view(3, rows * columns, 2)
    assert torch.equal(apart - torch.tensor([0, tiny.CLUSTERS]), book.assign(encoder(images[:3])))
    torch.testing.assert_close(book.centroids[apart].sum(2), book.lookup(book.assign(encoder(images[:3]))))
    with pytest.raises(DigitError, match="tokens a place is 2 in the codebook and 1 in the prior"):
        pipe.with_parts(prior=tiny.token_model("prior"))
    with pytest.raises(DigitError, match="stand for one place together"):
        build_atlas(pipe.tokenizer, [images[:2]], tmp_path / "patches")


def test_refusals(vectors):
    with pytest.raises(DigitError, match="17 principal components were asked for, and the features are 16 wide"):
        Discretisation(pca=17)(KMeans(K, show=False), vectors)
    with pytest.raises(DigitError, match="leave pca out"):
        Discretisation(kind="fsq", pca=3)


def test_command(fitted):
    for given, tokens, depth in (
        (["--kind", "residual", "--depth", "3", "--pca", "6"], 60, 3),
        (["--kind", "spherical"], 20, 1),
        (["--kind", "fsq"], 20, 1),
    ):
        output, book = fitted(*given)
        assert f"A codebook of {tokens} tokens from 64 images" in output
        assert book.config.depth == depth
