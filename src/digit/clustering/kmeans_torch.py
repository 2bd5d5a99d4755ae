"""k-means in torch: on a GPU, on several, and over features that are never written down.

Three modes, all of which begin with one pass over the images that draws a uniform sample of the features:

* ``sample``: Lloyd's iterations over that sample, as the authors and faiss do it;
* ``whole``: each of Lloyd's iterations runs all images through the encoder again;
* ``mini-batch``: so does each iteration here, but the centroids move after every batch (Sculley 2010, section 3).

Several processes (``torchrun``) share the images. They add up sums and counts, so that they find what one process
finds, up to rounding. Centroids start at random points of the sample or by k-means++ (Arthur & Vassilvitskii 2007); a
cluster that no vector is nearest to starts again at a vector that is far from its own centroid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from digit.clustering.kmeans import describe_encoder
from digit.clustering.streams import Points, Sample, Stream, gathered, hashed, summed
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.encoders.base import Encoder
from digit.models.codebook import Codebook, nearest

Mode = Literal["sample", "whole", "mini-batch"]
StartBy = Literal["k-means++", "random"]

_START_SAMPLE = 32  # vectors a centroid that k-means++ chooses from
_FAR = 256  # vectors of a pass that empty clusters may start again at


class Fit(NamedTuple):
    """What k-means found."""

    centroids: Tensor
    """(K, D) float32, on the CPU."""
    counts: Tensor
    """(K,) float64: how many vectors each is nearest to."""
    inertia: float
    """Mean squared distance of a vector to its centroid."""


class IndexedImages(Protocol):
    """A batch of images that says which they are, as :class:`digit.data.sampling.Batch` does."""

    @property
    def images(self) -> Tensor:
        """(B, 3, S, S) in 0..1."""
        ...

    @property
    def indices(self) -> Tensor:
        """(B,) numbers in the dataset."""
        ...


def fit_codebook(
    encoder: Encoder,
    batches: Callable[[int], Iterable[IndexedImages]],
    clusters: int,
    *,
    mode: Mode = "sample",
    start: StartBy = "k-means++",
    seed: int = 0,
    iterations: int = 20,
    max_points_per_centroid: int = 256,
    device: str | torch.device = "cpu",
    total: int | None = None,
    provenance: dict[str, Any] | None = None,
    show: bool = True,
) -> Codebook:
    """Fit K centroids to an encoder's features; see the module. Every process of a group calls it and gets the same
    codebook.

    Args:
        encoder: frozen.
        batches: gives this process's batches in a pass, called with the number of the pass; see
            :class:`~digit.clustering.streams.PassSampler`.
        clusters: K.
        mode, start: see the module.
        seed: of the sample and of the first centroids.
        iterations: of k-means; the modes "whole" and "mini-batch" read the data this often, and once before and once
            after.
        max_points_per_centroid: size of the sample in mode "sample". It is shared by the processes and kept in their
            memory.
        device: where encoder and k-means run.
        total: number of images, for the progress bar.
        provenance: more to keep with the codebook.
        show: show progress.

    Returns:
        The codebook; its provenance has what :func:`digit.clustering.kmeans.fit_codebook`'s has.

    Raises:
        DigitError: fewer vectors than clusters, or features that are not finite.
    """
    if clusters < 1 or iterations < 1 or max_points_per_centroid < 1:
        raise DigitError(
            f"clusters={clusters}, iterations={iterations}, max_points_per_centroid={max_points_per_centroid}: each must be at least 1."
        )
    network = encoder.to(device)

    def stream(number: int) -> Iterator[Points]:
        with bar(f"Reading features, pass {number + 1}", total=total, unit="images", show=show) as progress:
            for batch in batches(number):
                if len(batch.images):
                    yield _features(network, batch, torch.device(device))
                else:  # the others have images left
                    yield Points(torch.zeros(0, dtype=torch.long), torch.zeros(0, encoder.dim, device=device))
                progress.advance(len(batch.images))

    wanted = clusters * (max_points_per_centroid if mode == "sample" else _START_SAMPLE if start == "k-means++" else 1)
    sample = Sample(wanted, seed)
    for points in stream(0):
        sample.add(points)
    sample.settle(device)
    if sample.total < clusters:
        raise DigitError(
            f"The images gave {sample.seen} feature vectors, fewer than the {clusters} clusters asked for; "
            "give more images or ask for fewer clusters."
        )
    candidates = sample.smallest(_START_SAMPLE * clusters if start == "k-means++" else clusters, device)
    first = start_centroids(candidates, clusters, start, seed)
    if mode != "sample":
        sample.forget()
    source = sample.stream(device) if mode == "sample" else stream
    fit = kmeans(source, first, iterations=iterations, mini_batch=mode == "mini-batch", first_pass=1, show=show)
    share = fit.counts[fit.counts > 0] / fit.counts.sum()
    facts: dict[str, Any] = {
        "encoder": describe_encoder(encoder),
        "preprocessing": to_dict(encoder.preprocessing),
        "method": {"backend": "torch", "mode": mode, "start": start},
        "seed": seed,
        "iterations": iterations,
        "images": total,
        "vectors_seen": sample.seen,
        "vectors_used": int(fit.counts.sum()),
        "inertia": fit.inertia,
        "used_clusters": len(share),
        "dead_clusters": clusters - len(share),
        "perplexity": torch.exp(-(share * share.log()).sum()).item(),
    }
    positions = facts["encoder"].get("positions")
    return Codebook.from_centroids(fit.centroids, {**facts, **(provenance or {})}, positions=positions)


def kmeans(
    stream: Stream,
    centroids: Tensor,
    *,
    iterations: int = 20,
    mini_batch: bool = False,
    first_pass: int = 0,
    show: bool = True,
) -> Fit:
    """Move centroids to the means of the vectors that are nearest to them, again and again.

    Args:
        stream: the vectors of this process; with ``mini_batch`` every process must get as many parts in a pass.
        centroids: (K, D) float32 to begin with, the same in every process, on the device that computes.
        iterations: passes over the data. One more measures the result.
        mini_batch: move after every part of the stream: a centroid becomes the running mean of all it was ever given.
        first_pass: the number of the first pass.
        show: show progress.
    """
    seen = torch.zeros(len(centroids), dtype=_wide(centroids), device=centroids.device)  # (K,) of mini-batches
    with bar("Fitting the codebook", total=iterations, unit="iterations", show=show) as progress:
        for number in range(first_pass, first_pass + iterations):
            totals = _Totals(centroids)
            for points in stream(number):
                if mini_batch:
                    part = _Totals(centroids)
                    part.add(points, centroids)
                    part.reduce()
                    seen += part.counts
                    step = (part.sums - part.counts[:, None] * centroids) / seen.clamp(min=1)[:, None]
                    centroids = (centroids + step).float()
                    totals.take(part)
                else:
                    totals.add(points, centroids)
            if not mini_batch:
                totals.reduce()
                means = totals.sums / totals.counts.clamp(min=1)[:, None]
                centroids = torch.where((totals.counts > 0)[:, None], means, centroids).float()
            centroids = _revive(centroids, totals, seen)
            progress.advance(1, note=f"mean squared distance {totals.inertia:.4g}")
    totals = _Totals(centroids)
    for points in stream(first_pass + iterations):
        totals.add(points, centroids)
    totals.reduce()
    return Fit(centroids.cpu(), totals.counts.cpu().double(), totals.inertia)


def start_centroids(sample: Tensor, clusters: int, start: StartBy, seed: int) -> Tensor:
    """First centroids (K, D) out of a sample (m, D) in random order, m >= K.

    "random" takes the first; "k-means++" takes one after the other, each with a probability that grows with the squared
    distance to the nearest of those before.
    """
    if start == "random":
        return sample[:clusters].clone()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = [0]
    distances = (sample - sample[0]).square().sum(1)  # (m,)
    for draw in draws[1:]:
        ladder = distances.to(_wide(sample)).cumsum(0)
        place = int(torch.searchsorted(ladder, draw * ladder[-1], right=True).clamp(max=len(sample) - 1))
        if not ladder[-1] > 0:  # fewer different vectors than clusters
            place = len(chosen)
        chosen.append(place)
        distances = torch.minimum(distances, (sample - sample[place]).square().sum(1))
    return sample[torch.tensor(chosen, device=sample.device)]


class _Totals:
    """Sums over vectors, by the centroid that they are nearest to."""

    def __init__(self, centroids: Tensor) -> None:
        wide, device = _wide(centroids), centroids.device
        self.sums = torch.zeros(centroids.shape, dtype=wide, device=device)  # (K, D)
        self.counts = torch.zeros(len(centroids), dtype=wide, device=device)  # (K,)
        self._squared = torch.zeros(1, dtype=wide, device=device)
        # a sample (up to _FAR, D + 2) of the vectors, each with its squared distance and its key behind it
        self.far = torch.zeros(0, centroids.shape[1] + 2, device=device)

    @property
    def inertia(self) -> float:
        """Mean squared distance."""
        return float(self._squared / self.counts.sum())

    def add(self, points: Points, centroids: Tensor) -> None:
        """Count vectors (n, D)."""
        x = points.features
        if not len(x):
            return
        ids = nearest(x, centroids)  # (n,)
        squared = (x - centroids[ids]).square().sum(1)  # (n,)
        self.sums.index_add_(0, ids, x.to(self.sums.dtype))
        self.counts += torch.bincount(ids, minlength=len(centroids))
        self._squared += squared.to(self.sums.dtype).sum()
        # the largest keys are a sample with probabilities in proportion to the squared distance (Efraimidis & Spirakis
        # 2006)
        chance = (hashed(points.numbers, 0).double() / 2.0**63).log().float().to(x.device)  # (n,)
        self._remember(torch.cat([x, squared[:, None], (chance / squared)[:, None]], 1))

    def take(self, other: _Totals) -> None:
        """Add totals of all processes, without their sums."""
        self.counts += other.counts
        self._squared += other._squared
        self._remember(other.far)

    def reduce(self) -> None:
        """Add up over the processes."""
        for value in (self.sums, self.counts, self._squared):
            value.copy_(summed(value))
        everyones, self.far = gathered(self.far), self.far[:0]
        self._remember(everyones)

    def _remember(self, vectors: Tensor) -> None:
        together = torch.cat([self.far, vectors])
        self.far = together[together[:, -1].topk(min(_FAR, len(together))).indices]


def _revive(centroids: Tensor, totals: _Totals, seen: Tensor) -> Tensor:
    """Put centroids without any vector at vectors that are far from their own centroid, and from each other."""
    vectors, distances = totals.far[:, :-2], totals.far[:, -2]  # (m, D), (m,)
    for empty in torch.nonzero(totals.counts == 0)[: len(vectors), 0].tolist():
        furthest = vectors[distances.argmax()]
        centroids[empty], seen[empty] = furthest, 0
        distances = torch.minimum(distances, (vectors - furthest).square().sum(1))
    return centroids


@torch.inference_mode()
def _features(encoder: Encoder, batch: IndexedImages, device: torch.device) -> Points:
    features = encoder(batch.images.to(device)).float()  # (B, N, D)
    if not features.isfinite().all():
        raise DigitError(
            "The encoder's features are not finite: its weights are damaged, or the images are not in 0..1."
        )
    numbers = batch.indices[:, None] * features.shape[1] + torch.arange(features.shape[1])  # (B, N)
    return Points(numbers.flatten(), features.flatten(0, 1))


def _wide(like: Tensor) -> torch.dtype:
    """What sums are kept in: so wide that the order of the vectors does not show in float32."""
    return torch.float32 if like.device.type == "mps" else torch.float64
