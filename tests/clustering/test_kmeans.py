import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from digit.clustering.kmeans import Fit, KMeans, fit_codebook, start_centroids
from digit.clustering.streams import PassSampler, Points, Sample
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.transforms import Transform
from digit.data.dataset import open_dataset
from digit.data.sampling import Batches
from digit.encoders import weights_checksum
from digit.models.codebook import Codebook, nearest
from digit.pipeline.tokenizer import SemanticTokenizer

IMAGES, K = 96, 24
MODES = ("sample", "whole", "mini-batch")
# what every process of a group does, and a single one in its place
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from digit.data.dataset import open_dataset
from digit.data.sampling import Batches
from digit.core.transforms import Transform
from digit.encoders import small_conv
from digit.clustering.discretisers import Discretisation
from digit.clustering.kmeans import fit_codebook
from digit.clustering.streams import PassSampler, process_group

data, out = sys.argv[1:]
torch.manual_seed(0)
encoder = small_conv(widths=(8, 8, 16), blocks=(1, 1, 1)).eval().requires_grad_(False)
dataset = open_dataset(data).subset(range(97))
with process_group(torch.device("cpu")) as (rank, world, device):
    def passes(number):
        sampler = PassSampler(97, 32, 1, number, rank, world)
        return Batches(dataset, sampler, Transform(size=32, crop="none"), workers=0)
    for mode in ("sample", "whole", "mini-batch", "residual"):
        kind = Discretisation(kind="residual", pca=6, depth=2) if mode == "residual" else None
        book = fit_codebook(encoder, passes, 24, mode="whole" if kind else mode, discretiser=kind, seed=1, iterations=4,
                            max_points_per_centroid=100, total=97, show=False)
        book.save_pretrained(f"{out}/{mode}-{rank}-of-{world}")
"""


def in_memory(points, chunk=500):
    numbers = torch.arange(len(points))
    return lambda _: [Points(n, x) for n, x in zip(numbers.split(chunk), points.split(chunk), strict=True)]


def inertia(points, centroids):
    return float((points - centroids[nearest(points, centroids)]).square().sum(1).mean())


@pytest.fixture(scope="module")
def batches(cifar512):
    dataset, whole = open_dataset(cifar512).subset(range(IMAGES)), Transform(size=32, crop="none")
    return lambda number: Batches(dataset, PassSampler(IMAGES, 32, 1, number), whole, workers=0)


@pytest.fixture(scope="module")
def features(encoder, batches):
    return torch.cat([encoder(batch.images).flatten(0, 1) for batch in batches(0)])  # (6144, 16)


@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_inertia_agrees_with_scipy(features, start):
    """Within 1 %, on the mean over five seeds: k-means ends in a local minimum, which depends on where it began."""
    theirs, ours = [], []
    for seed in range(5):
        found, _ = kmeans2(features.numpy(), K, iter=20, minit="points", rng=seed)
        theirs.append(inertia(features, torch.from_numpy(found)))
        shuffled = features[torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))]
        fit = KMeans(K, show=False).move(in_memory(features), start_centroids(shuffled, K, start, seed))
        assert fit.inertia == pytest.approx(inertia(features, fit.centroids), rel=1e-5)
        ours.append(fit.inertia)
    assert np.mean(ours) < 1.01 * np.mean(theirs)
    if start == "random":  # k-means++ may be better than a random start
        assert np.mean(ours) > 0.99 * np.mean(theirs)


def test_same_start_gives_scipys_centroids(features):
    first = start_centroids(features, K, "random", 0)
    theirs, _ = kmeans2(features.numpy(), first.numpy(), iter=5, minit="matrix")
    ours = KMeans(K, iterations=5, show=False).move(in_memory(features), first)
    assert torch.allclose(ours.centroids, torch.from_numpy(theirs), atol=1e-3)
    assert ours.counts.sum() == len(features)


def test_quality_by_hand():
    facts = Fit(torch.zeros(3, 2), torch.tensor([2.0, 2, 0]).double(), 0.5).quality
    assert (facts["used_clusters"], facts["dead_clusters"], facts["inertia"]) == (2, 1, 0.5)
    assert facts["perplexity"] == pytest.approx(2.0)


def test_modes_on_real_images(encoder, batches, features):
    books = {
        mode: fit_codebook(encoder, batches, K, mode=mode, seed=1, total=IMAGES, provenance={"data": "x"}, show=False)
        for mode in MODES
    }
    # the sample is all there is, so both modes do the same
    assert torch.allclose(books["sample"].centroids, books["whole"].centroids, atol=1e-4)
    found = {mode: inertia(features, book.centroids) for mode, book in books.items()}
    assert found["mini-batch"] < 1.05 * found["whole"]
    facts = books["whole"].provenance
    counts = torch.bincount(nearest(features, books["whole"].centroids), minlength=K).double()
    expected = Fit(books["whole"].centroids, counts, found["whole"]).quality
    assert {name: facts[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (facts["images"], facts["vectors_seen"], facts["data"]) == (IMAGES, len(features), "x")
    assert facts["method"] == {"mode": "whole", "start": "random"}


def test_two_processes_find_what_one_does(cifar512, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", PROGRAM, str(cifar512), str(tmp_path)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pair = [
        subprocess.Popen(arguments, env={**os.environ, **group, "RANK": str(r)}, stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    single = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert single.returncode == 0, single.stderr
    for process in pair:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    for mode in (*MODES, "residual"):
        alone, first, second = (
            Codebook.from_pretrained(tmp_path / f"{mode}-{who}") for who in ("0-of-1", "0-of-2", "1-of-2")
        )
        assert torch.equal(first.centroids, second.centroids)
        # principal components of sums in another order differ in the last digits, and so does what is left over
        loose = 10 if mode == "residual" else 1
        assert torch.allclose(first.centroids, alone.centroids, atol=1e-5 * loose)
        for name in ("vectors_seen", "vectors_used", "used_clusters"):
            assert first.provenance[name] == alone.provenance[name]
        assert first.provenance["inertia"] == pytest.approx(alone.provenance["inertia"], rel=1e-5 * loose)
    assert Codebook.from_pretrained(tmp_path / "sample-0-of-2").provenance["vectors_used"] == 2400


@pytest.mark.parametrize("mini_batch", [False, True])
def test_empty_clusters_start_again_at_far_vectors(mini_batch):
    generator = torch.Generator().manual_seed(0)
    middles = 50 * torch.randn(8, 4, generator=generator)
    points = (middles[:, None] + torch.randn(8, 100, 4, generator=generator)).flatten(0, 1)
    points = points[torch.randperm(800, generator=generator)]
    # but for the first, none is anywhere near
    first = points[:1] + 1e4 * torch.arange(8)[:, None]
    fit = KMeans(8, mini_batch=mini_batch, show=False).move(in_memory(points, 100), first)
    assert int((fit.counts > 0).sum()) == 8
    assert fit.inertia < 0.1 * inertia(points, points.mean(0, keepdim=True))


def test_kmeans_plus_plus_spreads():
    generator = torch.Generator().manual_seed(0)
    middles = 100 * torch.randn(10, 6, generator=generator)
    points = (middles[:, None] + torch.randn(10, 50, 6, generator=generator)).flatten(0, 1)
    points = points[torch.randperm(500, generator=generator)]
    hit = [
        len(set(nearest(start_centroids(points, 10, start, 3), middles).tolist())) for start in ("k-means++", "random")
    ]
    assert hit[0] == 10 > hit[1]
    same = start_centroids(torch.ones(20, 3), 5, "k-means++", 0)
    assert torch.equal(same, torch.ones(5, 3))


def test_a_sample_is_uniform_and_does_not_feel_the_order():
    numbers = torch.arange(3000)
    vectors = numbers[:, None].float()
    counts = torch.zeros(3000)
    for seed in range(200):
        sample = Sample(300, seed, width=1)
        for part in numbers[torch.randperm(3000, generator=torch.Generator().manual_seed(seed))].split(251):
            sample.add(Points(part, vectors[part]))
        sample.settle("cpu")
        assert (sample.seen, sample.total, len(sample.points.numbers.unique())) == (3000, 300, 300)
        assert torch.equal(sample.points.features[:, 0].long(), sample.points.numbers)
        counts[sample.points.numbers] += 1
    again = Sample(300, 199, width=1)
    again.add(Points(numbers, vectors))
    again.settle("cpu")
    assert torch.equal(again.points.numbers, sample.points.numbers)
    assert torch.equal(again.smallest(7, "cpu"), sample.points.features[:7])
    # binomial: mean 20, variance 18
    assert float(((counts - 20) ** 2 / 18).mean()) == pytest.approx(1, abs=0.15)


def test_every_image_is_read_once_by_one_process():
    for world in (1, 2, 5):
        samplers = [PassSampler(97, 32, 0, 3, rank, world) for rank in range(world)]
        assert {sampler.steps for sampler in samplers} == {4}
        for step in range(4):
            batch = np.concatenate([sampler.indices(step) for sampler in samplers])
            assert np.array_equal(batch, PassSampler(97, 32, 0, 3).indices(step))
    whole = np.concatenate([PassSampler(97, 32, 0, 3).indices(step) for step in range(4)])
    assert sorted(whole) == list(range(97))
    assert not np.array_equal(whole[:32], PassSampler(97, 32, 0, 4).indices(0))


def test_fitted_on_plain_images_is_saved_and_tokenizes(encoder, batches, tmp_path):
    images = torch.cat([b.images for b in batches(0)])
    book = fit_codebook(encoder, images.split(32), K, seed=1, provenance={"data": "abc"}, show=False)
    facts = book.provenance
    assert book.centroids.shape == (K, 16)
    assert (facts["images"], facts["vectors_seen"], facts["vectors_used"]) == (IMAGES, IMAGES * 64, K * 256)
    assert facts["encoder"]["checksum"] == weights_checksum(encoder)
    assert facts["preprocessing"] == to_dict(encoder.preprocessing)
    assert facts["data"] == "abc"
    # against the mean of all features, clusters explain a good part
    features = encoder(images).flatten(0, 1)
    assert facts["inertia"] < 0.7 * (features - features.mean(0)).square().sum(1).mean().item()
    book.save_pretrained(tmp_path / "book")
    loaded = Codebook.from_pretrained(tmp_path / "book")
    assert loaded.provenance == json.loads(json.dumps(facts))
    assert torch.equal(loaded.centroids, book.centroids)
    assert torch.equal(SemanticTokenizer(encoder, loaded).encode(images), book.assign(encoder(images)))


def test_fitting_depends_on_seed_and_images_alone(encoder, batches):
    images = torch.cat([b.images for b in batches(0)])
    options = {"seed": 5, "iterations": 3, "max_points_per_centroid": 40, "show": False}
    first = fit_codebook(encoder, images.split(32), 16, **options)
    assert first.provenance["vectors_used"] == 640
    assert torch.allclose(first.centroids, fit_codebook(encoder, images.split(7), 16, **options).centroids, atol=1e-4)
    other = fit_codebook(encoder, images.split(32), 16, **options | {"seed": 6})
    assert not torch.allclose(first.centroids, other.centroids, atol=1e-2)


def test_refusals(encoder, batches):
    with pytest.raises(DigitError, match=r"6144 feature vectors, fewer than the 7000 clusters"):
        fit_codebook(encoder, batches, 7000, show=False)
    with pytest.raises(DigitError, match="fewer than the 4 clusters"):
        fit_codebook(encoder, [], 4, show=False)
    for sizes in ({"iterations": 0}, {"max_points_per_centroid": 0}):
        with pytest.raises(DigitError, match="at least 1"):
            fit_codebook(encoder, batches, 4, show=False, **sizes)
    with pytest.raises(DigitError, match="not finite"):
        fit_codebook(encoder, [torch.full((1, 3, 32, 32), torch.nan)], 4, show=False)
    with pytest.raises(DigitError, match="give a function"):
        fit_codebook(encoder, [], 4, mode="whole", show=False)


def test_command(fitted):
    old = ["--backend", "torch"]  # an option of the first edition
    for given, method in (
        ([*old, "--mode", "mini-batch", "--start", "k-means++"], {"mode": "mini-batch", "start": "k-means++"}),
        ([], {"mode": "sample", "start": "random"}),
    ):
        output, book = fitted(*given)
        assert "A codebook of 20 tokens from 64 images" in output
        assert book.provenance["method"] == method
        assert book.provenance["data"]["images"] == 64
