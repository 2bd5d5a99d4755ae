"""Fit a codebook: k-means over an encoder's patch features, on the CPU, a GPU or several, never written to disk.

Source: the paper's section 3 and the authors' preprocess/ (DAMO-NLP-SG/DiGIT at cd6d8ca): 20 iterations of Lloyd's
algorithm, plain squared distance, random first centroids, at most 256 vectors a centroid. They write every feature to
disk, about 100 GB; here those 256 a centroid alone are kept. Three modes begin with one pass over the images that draws
a uniform sample of the features:

* ``sample``: Lloyd's iterations over that sample, as the authors do it;
* ``whole``: each of Lloyd's iterations runs all images through the encoder again;
* ``mini-batch``: so does each iteration here, but the centroids move after every batch (Sculley 2010, section 3).

Several processes (``torchrun``) share the images. They add up sums and counts, so that they find what one process
finds, up to rounding. A cluster that no vector is nearest to starts again at a vector that is far from its own
centroid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from digit.clustering.streams import Points, Sample, Stream, Vectors, gathered, hashed, summed
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.encoders.base import Encoder, weights_checksum
from digit.models.codebook import Codebook, nearest

Mode = Literal["sample", "whole", "mini-batch"]
StartBy = Literal["random", "k-means++"]

_START_SAMPLE = 32  # vectors a centroid that k-means++ chooses from
_FAR = 256  # vectors of a pass that empty clusters may start again at


class Fit(NamedTuple):
    """Centroids, how many vectors each is nearest to, and the mean squared distance of a vector to its centroid."""

    centroids: Float[Tensor, "K D"]
    counts: Float[Tensor, " K"]
    inertia: float

    @property
    def quality(self) -> dict[str, Any]:
        """For a provenance: "inertia", "used_clusters", "dead_clusters", and "perplexity", exp of the entropy of the
        ids.
        """
        share = self.counts[self.counts > 0] / self.counts.sum()
        return {
            "inertia": self.inertia,
            "used_clusters": len(share),
            "dead_clusters": len(self.counts) - len(share),
            "perplexity": torch.exp(-(share * share.log()).sum()).item(),
        }


@dataclass(frozen=True)
class KMeans:
    """Plain k-means.

    Attributes:
        clusters, start, seed, iterations, show: as for :func:`fit_codebook`.
        mini_batch: move after every part of the stream: a centroid becomes the running mean of all it was ever given.
        spherical: scale the means to length 1, for vectors of length 1 (Dhillon & Modha 2001).
    """

    clusters: int
    start: StartBy = "random"
    seed: int = 0
    iterations: int = 20
    mini_batch: bool = False
    show: bool = True
    spherical: bool = False

    def fit(self, features: Vectors) -> Codebook:
        """A codebook whose provenance is :attr:`Fit.quality`; the same in every process."""
        first = start_centroids(features.first, self.clusters, self.start, self.seed)
        fit = self.move(features.stream, first, features.passes)
        return Codebook.from_centroids(fit.centroids, fit.quality)

    def move(self, stream: Stream, centroids: Float[Tensor, "K D"], first_pass: int = 0) -> Fit:
        """Move centroids to the means of the vectors that are nearest to them, again and again; one more pass over the
        data measures the result.

        ``stream`` has the vectors of this process; with ``mini_batch`` every process must get as many parts in a pass.
        ``centroids`` are float32 to begin with, the same in every process, on the device that computes.
        """
        seen = torch.zeros(len(centroids), dtype=wide(centroids), device=centroids.device)  # (K,) of mini-batches
        last = first_pass + self.iterations
        with bar("Fitting the codebook", total=self.iterations, unit="iterations", show=self.show) as progress:
            for number in range(first_pass, last):
                totals = _Totals(centroids)
                for points in stream(number):
                    part = _Totals(centroids) if self.mini_batch else totals
                    part.add(points, centroids)
                    if self.mini_batch:
                        part.reduce()
                        seen += part.counts
                        step = (part.sums - part.counts[:, None] * centroids) / seen.clamp(min=1)[:, None]
                        centroids = (centroids + step).float()
                        totals.take(part)
                if not self.mini_batch:
                    totals.reduce()
                    means = totals.sums / totals.counts.clamp(min=1)[:, None]
                    centroids = torch.where((totals.counts > 0)[:, None], means, centroids).float()
                if self.spherical:
                    centroids = F.normalize(centroids, dim=1)
                centroids = _revive(centroids, totals, seen)
                progress.advance(1, note=f"mean squared distance {totals.inertia:.4g}")
        totals = _Totals(centroids)
        for points in stream(last):
            totals.add(points, centroids)
        totals.reduce()
        return Fit(centroids.cpu(), totals.counts.cpu().double(), totals.inertia)


def fit_codebook(
    encoder: Encoder,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    clusters: int,
    *,
    discretiser: Callable[[KMeans, Vectors], Codebook] | None = None,
    mode: Mode = "sample",
    start: StartBy = "random",
    seed: int = 0,
    iterations: int = 20,
    max_points_per_centroid: int = 256,
    device: str | torch.device = "cpu",
    total: int | None = None,
    provenance: dict[str, Any] | None = None,
    show: bool = True,
) -> Codebook:
    """Fit K centroids to the features of images. The encoder carries its preprocessing, so a codebook is fitted on
    exactly what the tokenizer will see. Every process of a group calls this and gets the same codebook.

    Args:
        batches: images (B, 3, S, S) in 0..1, or batches that carry ``images`` and their ``indices`` in the dataset, as
            :class:`digit.data.sampling.Batch`. Read once, to the end; or called with the number of the pass, which the
            modes "whole" and "mini-batch" need: see :class:`~digit.clustering.streams.PassSampler`.
        discretiser: what is made of k-means with these settings and the vectors, such as
            :class:`~digit.clustering.discretisers.Discretisation`; None leaves plain k-means.
        mode: see the module. "whole" and "mini-batch" read the data ``iterations`` + 2 times.
        start: the first centroids: "random" vectors, as in the paper; or by "k-means++" (Arthur & Vassilvitskii 2007),
            whose time grows with K squared.
        seed: of the sample and of the first centroids.
        iterations: of k-means. The paper: 20.
        max_points_per_centroid: size of the sample in mode "sample", 4 K D bytes each in all processes together (6.4 GB
            for the paper's base model).
        total: number of images, for the progress bar.
        provenance: more to keep with the codebook, beside the encoder, the seed, vectors seen and used, and
            :attr:`Fit.quality`.

    Raises:
        DigitError: fewer vectors than clusters, or features that are not finite.
    """
    if clusters < 1 or iterations < 1 or max_points_per_centroid < 1:
        raise DigitError(
            f"clusters={clusters}, iterations={iterations}, max_points_per_centroid={max_points_per_centroid}: each "
            "must be at least 1."
        )
    if not callable(batches) and mode != "sample":
        raise DigitError(
            f"mode='{mode}' reads the images many times; give a function from a pass's number to its batches."
        )
    passes: Callable[[int], Iterable[Any]] = batches if callable(batches) else lambda _: batches
    network, device, images = encoder.to(device), torch.device(device), 0

    def stream(number: int) -> Iterator[Points]:
        nonlocal images
        images = 0
        with bar(f"Reading features, pass {number + 1}", total=total, unit="images", show=show) as progress:
            for batch in passes(number):
                pixels = batch if isinstance(batch, Tensor) else batch.images
                indices = images + torch.arange(len(pixels)) if isinstance(batch, Tensor) else batch.indices
                yield _features(network, pixels, indices, device)
                images += len(pixels)
                progress.advance(len(pixels))

    wanted = clusters * (max_points_per_centroid if mode == "sample" else _START_SAMPLE if start == "k-means++" else 1)
    sample = Sample(wanted, seed, encoder.dim)
    for points in stream(0):
        sample.add(points)
    sample.settle(device)
    if sample.total < clusters:
        raise DigitError(
            f"The images gave {sample.seen} feature vectors, fewer than the {clusters} clusters asked for; "
            "give more images or ask for fewer clusters."
        )
    candidates = sample.smallest(_START_SAMPLE * clusters if start == "k-means++" else clusters, device)
    if mode != "sample":
        sample.forget()
    plain = KMeans(clusters, start, seed, iterations, mode == "mini-batch", show)
    vectors = Vectors(sample.stream(device) if mode == "sample" else stream, candidates, 1, mode == "sample")
    book = (discretiser or KMeans.fit)(plain, vectors)
    described = describe_encoder(encoder)
    facts: dict[str, Any] = {
        "encoder": described,
        "preprocessing": to_dict(encoder.preprocessing),
        "method": {"mode": mode, "start": start},
        "seed": seed,
        "iterations": iterations,
        "images": int(summed(torch.tensor([images], device=device))),
        "vectors_seen": sample.seen,
        "vectors_used": sample.total if mode == "sample" else sample.seen,
        **book.provenance,
        **(provenance or {}),
    }
    return Codebook.from_centroids(book.centroids, facts, depth=book.config.depth, positions=described.get("positions"))


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What a codebook must remember of the encoder whose features it was fitted to."""
    facts: dict[str, Any] = {"type": type(encoder).__name__, "dim": encoder.dim, "grid": list(encoder.grid)}
    if isinstance(encoder, nn.Module):
        facts["checksum"] = weights_checksum(encoder)
    config = getattr(encoder, "config", None)
    layers = ("layers", "combine") if getattr(config, "layers", ()) else ("layer",)
    names = (*layers, "final_norm", "positions")
    return facts | {name: getattr(config, name) for name in names if hasattr(config, name)}


@torch.inference_mode()
def _features(encoder: Encoder, images: Tensor, indices: Tensor, device: torch.device) -> Points:
    if not len(images):  # other processes have images left
        return Points(torch.zeros(0, dtype=torch.long), torch.zeros(0, encoder.dim, device=device))
    features = encoder(images.to(device)).float()  # (B, N, D)
    if not features.isfinite().all():
        raise DigitError(
            "The encoder's features are not finite: its weights are damaged, or the images are not in 0..1."
        )
    numbers = indices[:, None] * features.shape[1] + torch.arange(features.shape[1])  # (B, N)
    return Points(numbers.flatten(), features.flatten(0, 1))


def start_centroids(sample: Float[Tensor, "m D"], clusters: int, start: StartBy, seed: int) -> Float[Tensor, "K D"]:
    """First centroids out of a sample in random order, m >= K: the first ones; or with "k-means++" one after the other,
    with a probability that grows with the squared distance to the nearest of those before.
    """
    if start == "random":
        return sample[:clusters].clone()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = [0]
    distances = (sample - sample[0]).square().sum(1)  # (m,)
    for draw in draws[1:]:
        ladder = distances.to(wide(sample)).cumsum(0)
        place = int(torch.searchsorted(ladder, draw * ladder[-1], right=True).clamp(max=len(sample) - 1))
        if not ladder[-1] > 0:  # fewer different vectors than clusters
            place = len(chosen)
        chosen.append(place)
        distances = torch.minimum(distances, (sample - sample[place]).square().sum(1))
    return sample[torch.tensor(chosen, device=sample.device)]


class _Totals:
    """Sums over vectors, by the centroid that they are nearest to."""

    def __init__(self, centroids: Tensor) -> None:
        clusters, width = centroids.shape
        like: dict[str, Any] = {"dtype": wide(centroids), "device": centroids.device}
        self.sums, self.counts = torch.zeros(clusters, width, **like), torch.zeros(clusters, **like)
        self._squared = torch.zeros(1, **like)
        # a sample (up to _FAR, D + 2) of the vectors, each with its squared distance and its key behind it
        self.far = torch.zeros(0, width + 2, device=centroids.device)

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


def wide(like: Tensor) -> torch.dtype:
    """What sums are kept in: so wide that the order of the vectors does not show in float32."""
    return torch.float32 if like.device.type == "mps" else torch.float64
