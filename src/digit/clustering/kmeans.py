"""Fit a codebook: k-means over a uniform sample of an encoder's patch features, taken while they stream by.

Source: the paper's section 3 and the authors' preprocess/ (DAMO-NLP-SG/DiGIT at cd6d8ca): faiss.Kmeans, 20 iterations,
    plain squared
distance. They write every feature to disk, about 100 GB, of which faiss then uses 256 a centroid; here those alone are
ever kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from digit.core.config import to_dict
from digit.core.errors import DigitError, require
from digit.core.progress import bar
from digit.encoders.base import Encoder, weights_checksum
from digit.models.codebook import Codebook, nearest


class HasImages(Protocol):
    """A batch that carries images (B, 3, S, S) in 0..1, as :class:`digit.data.sampling.Batch` does."""

    @property
    def images(self) -> Tensor:
        """The images."""
        ...


class Reservoir:
    """A uniform sample without replacement of a stream of vectors whose length is not known.

    Every subset of ``capacity`` vectors is equally likely. The sample depends on the seed and the stream alone, not on
    how the stream is cut into batches. Source: algorithm R, Vitter 1985.

    Attributes:
        seen: vectors that went by.
    """

    def __init__(self, capacity: int, dim: int, seed: int) -> None:
        """Reserve ``capacity * dim * 4`` bytes, which the system fills only as they are used."""
        self._kept = np.empty((capacity, dim), dtype=np.float32)
        self._rng = np.random.default_rng(seed)
        self.seen = 0

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Show it the next vectors (n, D) of the stream."""
        capacity = len(self._kept)
        numbers = np.arange(self.seen, self.seen + len(vectors))
        self.seen += len(vectors)
        # vector t goes to a random one of t + 1 places, of which only the first `capacity` exist
        places = np.where(numbers < capacity, numbers, 0)
        late = numbers >= capacity
        places[late] = self._rng.integers(0, numbers[late], endpoint=True)
        # of several that meet in one place the last stays
        rows = np.flatnonzero(places < capacity)[::-1]
        places, first = np.unique(places[rows], return_index=True)
        self._kept[places] = vectors[rows[first]]

    @property
    def sample(self) -> NDArray[np.float32]:
        """The sample (min(seen, capacity), D), in no particular order."""
        return self._kept[: min(self.seen, len(self._kept))]


def fit_codebook(
    encoder: Encoder,
    batches: Iterable[Tensor | HasImages],
    clusters: int,
    *,
    seed: int = 0,
    iterations: int = 20,
    max_points_per_centroid: int = 256,
    device: str | torch.device = "cpu",
    total: int | None = None,
    provenance: dict[str, Any] | None = None,
    show: bool = True,
) -> Codebook:
    """Fit K centroids to the features of a stream of images.

    The encoder carries its preprocessing, so a codebook is fitted on exactly what the tokenizer will see. Memory is
    that of the
    sample: ``max_points_per_centroid * clusters * D * 4`` bytes (6.4 GB for the paper's base model).

    Args:
        encoder: frozen.
        batches: images (B, 3, S, S) in 0..1, or batches that carry them; read once, to the end.
        clusters: K.
        seed: of the sample and of the first centroids.
        iterations: of k-means. The paper: 20.
        max_points_per_centroid: at most this many feature vectors a centroid are used. faiss's default and the
            authors': 256.
        device: where the encoder runs; k-means itself runs on the CPU.
        total: number of images, for the progress bar.
        provenance: more to keep with the codebook, such as the data's fingerprint.
        show: show progress.

    Returns:
        the codebook; its provenance has the encoder's type, checksum, layer and preprocessing, the seed, vectors seen
        and used, and the :func:`quality` of the centroids on the sample.

    Raises:
        DigitError: fewer vectors than clusters, or features that are not finite.
    """
    if clusters < 1 or iterations < 1 or max_points_per_centroid < 1:
        raise DigitError(
            f"clusters={clusters}, iterations={iterations}, max_points_per_centroid={max_points_per_centroid}: each must be at least 1."
        )
    reservoir = Reservoir(max_points_per_centroid * clusters, encoder.dim, seed)
    images = _fill(reservoir, encoder.to(device), batches, torch.device(device), total, show)
    sample = reservoir.sample
    if len(sample) < clusters:
        raise DigitError(
            f"{images} images gave {reservoir.seen} feature vectors, fewer than the {clusters} clusters asked for; "
            "give more images or ask for fewer clusters."
        )
    centroids = torch.from_numpy(_kmeans(sample, clusters, iterations, seed, max_points_per_centroid, show))
    facts = {
        "encoder": describe_encoder(encoder),
        "preprocessing": to_dict(encoder.preprocessing),
        "seed": seed,
        "iterations": iterations,
        "images": images,
        "vectors_seen": reservoir.seen,
        "vectors_used": len(sample),
        **quality(torch.from_numpy(sample), centroids),
    }
    positions = facts["encoder"].get("positions")
    return Codebook.from_centroids(centroids, {**facts, **(provenance or {})}, positions=positions)


@torch.inference_mode()
def _fill(
    reservoir: Reservoir,
    encoder: Encoder,
    batches: Iterable[Tensor | HasImages],
    device: torch.device,
    total: int | None,
    show: bool,
) -> int:
    """Run the images through the encoder; returns how many there were."""
    count = 0
    with bar("Reading features", total=total, unit="images", show=show) as progress:
        for batch in batches:
            images = batch if isinstance(batch, Tensor) else batch.images
            features = encoder(images.to(device)).flatten(0, 1).float().cpu()  # (B * N, D)
            if not features.isfinite().all():
                raise DigitError(
                    "The encoder's features are not finite: its weights are damaged, or the images are not in 0..1."
                )
            reservoir.add(features.numpy())
            count += len(images)
            progress.advance(len(images))
    return count


def _kmeans(
    sample: NDArray[np.float32], clusters: int, iterations: int, seed: int, max_points: int, show: bool
) -> NDArray[np.float32]:
    """Centroids (K, D): faiss's k-means, one iteration a call, so that progress shows and Ctrl-C is heard."""
    faiss = require("faiss", "train", "Fitting a codebook")
    centroids: NDArray[np.float32] | None = None
    with bar("Fitting the codebook", total=iterations, unit="iterations", show=show) as progress:
        for _ in range(iterations):
            # faiss warns below 39 points a centroid; small data are the user's own choice
            fit = faiss.Kmeans(
                sample.shape[1],
                clusters,
                niter=1,
                seed=seed,
                max_points_per_centroid=max_points,
                min_points_per_centroid=1,
            )
            fit.train(sample, init_centroids=centroids)
            centroids = np.array(fit.centroids, dtype=np.float32).reshape(clusters, -1)
            progress.advance(1, note=f"mean squared distance {fit.obj[-1] / len(sample):.4g}")
    assert centroids is not None
    return centroids


def quality(features: Tensor, centroids: Tensor) -> dict[str, Any]:
    """How well centroids (K, D) stand for feature vectors (n, D).

    Returns:
        "inertia": mean squared distance to the nearest centroid; "used_clusters", "dead_clusters": with and without any
        vector; "perplexity": exp of the entropy of the ids, between 1 and K.
    """
    ids = nearest(features, centroids)  # (n,)
    counts = torch.bincount(ids, minlength=len(centroids)).double()  # (K,)
    share = counts[counts > 0] / counts.sum()
    squared = 0.0
    for start in range(0, len(features), 65536):
        part = slice(start, start + 65536)
        squared += (features[part] - centroids[ids[part]]).double().square().sum().item()
    return {
        "inertia": squared / len(features),
        "used_clusters": len(share),
        "dead_clusters": len(centroids) - len(share),
        "perplexity": torch.exp(-(share * share.log()).sum()).item(),
    }


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """What a codebook must remember of the encoder whose features it was fitted to."""
    facts: dict[str, Any] = {"type": type(encoder).__name__, "dim": encoder.dim, "grid": list(encoder.grid)}
    if isinstance(encoder, nn.Module):
        facts["checksum"] = weights_checksum(encoder)
    config = getattr(encoder, "config", None)
    for name in ("layer", "final_norm", "positions"):
        if hasattr(config, name):
            facts[name] = getattr(config, name)
    return facts
