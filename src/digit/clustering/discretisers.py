"""Other ways than plain k-means to cut the feature space into tokens.

All but residual k-means end in a plain codebook, for the nearest centroid in the encoder's own space gives the same
tokens: centroids in the space of some principal components are carried back into the full one, where the distance to
them grows by what the components leave out, which is the same for all; and to centroids of equal length the nearest is
the one of the smallest angle. So nothing but centroids is saved, and whatever takes a codebook takes these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import log, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from digit.clustering.kmeans import Fit, KMeans, wide
from digit.clustering.streams import Vectors, summed
from digit.core.config import PositiveInt, config
from digit.core.errors import DigitError
from digit.models.codebook import Codebook, nearest

Kind = Literal["kmeans", "spherical", "pca", "residual", "fsq"]


@config
class Discretisation:
    """Which way to cut the feature space.

    Attributes:
        kind: kmeans: plain. spherical: by angle. pca: k-means in the space of ``pca`` principal components. residual:
            k-means, and again of what is left, ``depth`` tokens a place. fsq: a fixed grid over few components (finite
            scalar quantisation, Mentzer et al. 2023, arXiv 2309.15505).
        pca: principal components that every kind but fsq works in; None: all, and for kind pca a quarter of the width.
        depth: tokens a place of kind residual.
    """

    kind: Kind = "kmeans"
    pca: PositiveInt | None = None
    depth: PositiveInt = 4

    def __post_init__(self) -> None:
        if self.kind == "fsq" and self.pca is not None:
            raise DigitError("FSQ takes a principal component for each of its levels; leave pca out.")

    def __str__(self) -> str:
        parts = f"depth {self.depth}" if self.kind == "residual" else "", f"{self.pca} components" if self.pca else ""
        return ", ".join(filter(None, (self.kind, *parts)))

    def __call__(self, kmeans: KMeans, features: Vectors) -> Codebook:
        """The codebook of feature vectors, by the settings of ``kmeans``; the same in every process."""
        if self.kind == "fsq":
            levels = fsq_levels(kmeans.clusters)
            return principal_components(len(levels), partial(fsq, levels), features)
        fit: Callable[[Vectors], Codebook] = kmeans.fit
        if self.kind == "spherical":
            fit = partial(spherical, kmeans)
        if self.kind == "residual":
            fit = partial(residual, kmeans, self.depth)
        return principal_components(self.pca, fit, features) if self.pca or self.kind == "pca" else fit(features)


def spherical(kmeans: KMeans, features: Vectors) -> Codebook:
    """K-means of directions; the centroids then get one length, at which they are nearest to the vectors."""
    unit = replace(kmeans, spherical=True).fit(features.map(lambda x: F.normalize(x, dim=1)))
    centroids = unit.centroids.to(features.first.device)
    along, count = _sums(features, lambda x: (x * centroids[nearest(x, centroids)]).sum())
    return _described(Codebook.from_centroids(centroids * (along / count)), features, {"kind": "spherical"})


def residual(kmeans: KMeans, depth: int, features: Vectors) -> Codebook:
    """K-means of the vectors, then of their differences from what was found, ``depth`` times."""
    tables: list[Tensor] = []
    rest = features
    for _ in range(depth):
        book = kmeans.fit(rest).to(features.first.device)
        tables.append(book.centroids)
        rest = rest.map(lambda x, book=book: x - book.lookup(book.assign(x)))  # type: ignore[misc]
    return _described(Codebook.from_centroids(torch.cat(tables), depth=depth), features, {"kind": "residual"})


def principal_components(components: int | None, fit: Callable[[Vectors], Codebook], features: Vectors) -> Codebook:
    """Another discretiser in the space of the directions in which vectors vary most; None: a quarter of the width. A
    DigitError for more components than the vectors are wide.

    Mean and covariance are sums over a pass, so vectors are not kept. The components are not scaled to equal variance.
    ``pca`` in the provenance has the share of variance kept.
    """
    width = features.first.shape[1]
    count = components or max(1, width // 4)
    if count > width:
        raise DigitError(f"{count} principal components were asked for, and the features are {width} wide.")
    mean, covariance = moments(features)
    variances, directions = torch.linalg.eigh(covariance)  # the smallest first
    axes = directions.T.flip(0)[:count].float().to(features.first.device)  # (c, D)
    middle = mean.float().to(axes.device)
    inside = fit(features.map(lambda x: (x - middle) @ axes.T))
    tables = inside.tables.to(axes.device) @ axes  # (d, K, D)
    tables[0] += middle
    book = Codebook.from_centroids(tables.flatten(0, 1), depth=inside.config.depth)
    kept = float(variances.flip(0)[:count].sum() / variances.sum())
    return _described(book, features, {**inside.provenance, "pca": {"components": count, "variance": kept}})


def fsq(levels: tuple[int, ...], features: Vectors) -> Codebook:
    """A grid of fixed levels for vectors as wide as there are levels: component i is cut into L_i steps of equal size
    over two deviations to either side.

    Rounding each component is the nearest point of the grid, so the grid is a codebook. The paper bounds with tanh, for
    a gradient; nothing is trained here, and the outermost levels take all beyond them.
    """
    mean, covariance = moments(features)
    points = [
        middle + 4 * deviation / count * (torch.arange(count, dtype=mean.dtype) - (count - 1) / 2)
        for middle, deviation, count in zip(mean, covariance.diagonal().sqrt(), levels, strict=True)
    ]
    grid = torch.cartesian_prod(*points).reshape(-1, len(levels))  # (K, c)
    return _described(Codebook.from_centroids(grid.float()), features, {"kind": "fsq", "levels": list(levels)})


def fsq_levels(clusters: int) -> tuple[int, ...]:
    """Levels whose product is near K and not above it: as equal as can be, at least 5 each where K allows it."""
    count = max(1, int(log(clusters) / log(5) + 1e-9))
    levels = [int(clusters ** (1 / count) + 1e-9)] * count
    for index in range(count):
        more = [*levels[:index], levels[index] + 1, *levels[index + 1 :]]
        levels = more if prod(more) <= clusters else levels
    return tuple(levels)


def moments(features: Vectors) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and covariance in float64 on the CPU, of the vectors of all processes."""
    middle = features.first.mean(0)  # near the mean, so that squares do not swamp the variance

    def sums(x: Tensor) -> Tensor:
        centred = x - middle
        return torch.cat([centred.sum(0, keepdim=True), centred.T @ centred])

    total, count = _sums(features, sums)
    mean, squares = total[0] / count, total[1:] / count
    return mean + middle.double().cpu(), squares - torch.outer(mean, mean)


def _described(book: Codebook, features: Vectors, facts: dict[str, Any]) -> Codebook:
    """The codebook, with ``facts`` and its quality as its provenance."""
    book, size = book.to(features.first.device), book.config.clusters
    rows = len(book.centroids)
    places = torch.arange(0, rows, size, device=book.centroids.device)  # where each depth begins

    def sums(x: Tensor) -> Tensor:
        ids = book.assign(x)
        counts = torch.bincount((ids.view(len(x), -1) + places).flatten(), minlength=rows)
        return torch.cat([counts, (x - book.lookup(ids)).square().sum()[None]])

    total, count = _sums(features, sums)
    book.provenance = {**facts, **Fit(book.centroids, total[:-1], float(total[-1] / count)).quality}
    return book.cpu()


def _sums(features: Vectors, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, int]:
    """What ``of`` gives for each part of the vectors, added up over all processes in float64; and how many vectors."""
    total, count = torch.zeros((), device=features.first.device, dtype=wide(features.first)), 0
    for points in features.stream(features.passes):
        if len(points.features):
            total, count = total + of(points.features).to(total), count + len(points.features)
    return summed(total).double().cpu(), int(summed(torch.tensor(count, device=total.device)))
