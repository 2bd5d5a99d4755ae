"""The paper's toy figure: two overlapping classes in the plane, projected to one number by PCA and by LDA.

PCA keeps the direction of the largest variance, as a reconstructing autoencoder does; LDA keeps the one that separates
the classes, as discriminative self-supervision does. Under growing noise the discriminative projection stays the better
one. The paper shows this figure (Fig. 5) without its numbers; :class:`ToyConfig` is this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from digit.core.config import config, from_dict, to_dict
from digit.core.errors import require
from digit.evaluation.results import OTHER, OURS, PAPER, Result, Rows, legend, panels, timed

Points = NDArray[np.float64]
METHODS = {"PCA": (OTHER, "--"), "LDA": (OURS, "-")}


@config
class ToyConfig:
    """Two Gaussian classes and the noise.

    Attributes:
        offset: half the distance between the class means along the long and the short axis.
        spread: standard deviation of both classes along the long and the short axis.
        angle: degrees by which the plane is turned, so that neither axis is special.
        samples: points a class, for fitting, and as many again for testing.
        noise: standard deviations of the isotropic Gaussian noise added to the test points.
        repeats: fresh draws of everything, for the mean and the deviation.
        seed: of all draws.
    """

    offset: tuple[float, float] = (1.0, 1.0)
    spread: tuple[float, float] = (3.0, 0.6)
    angle: float = 30.0
    samples: int = 1000
    noise: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    repeats: int = 20
    seed: int = 0


@dataclass(frozen=True)
class ToyValues:
    """By method, mean and standard deviation over the repeats of the accuracy at each level of noise."""

    noise: tuple[float, ...]
    accuracy: dict[str, list[float]]
    deviation: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class Toy(Result):
    """Accuracy under noise; the figure draws the first repeat again from the settings."""

    plot: ClassVar[str] = "pca-lda.png"
    kind: str = "toy"
    values: ToyValues

    def rows(self) -> Rows:
        levels = [f"noise {level:g}" for level in self.values.noise]
        return [
            {"Accuracy": method, **{level: f"{value:.1%}" for level, value in zip(levels, values, strict=True)}}
            for method, values in self.values.accuracy.items()
        ]

    def figure(self) -> Any:
        settings = from_dict(ToyConfig, self.settings, "The toy figure")
        points, labels = draw(settings, np.random.default_rng([settings.seed, 0]))
        figure, (plane, *histograms, curve) = panels(4, (3.9, 3.7))
        colors = ("#5b8def", "#e2893b")
        for label, color in enumerate(colors):
            plane.scatter(*points[labels == label][:300].T, s=8, color=color, alpha=0.6, lw=0, label=f"class {label}")
        plane.set(title="Two classes in the plane", aspect="equal", xlim=(-10.5, 10.5), ylim=(-10.5, 10.5))
        for axes, (method, (color, line)) in zip(histograms, METHODS.items(), strict=True):
            projection = fit(method, points, labels)
            ends = projection.centre + np.outer([-5.5, 5.5], projection.direction)
            plane.plot(*ends.T, color="#000000", linestyle=line, label=f"{method} direction")
            values = projection(points)[:, 0]
            bins = np.linspace(values.min(), values.max(), 50)
            for label, shade in enumerate(colors):
                axes.hist(values[labels == label], bins, color=shade, alpha=0.6, label=f"class {label}")
            mean, deviation = np.array(self.values.accuracy[method]), np.array(self.values.deviation[method])
            axes.set(title=f"{method}: accuracy {mean[0]:.1%}", xlabel="projected number", yticks=[])
            curve.plot(self.values.noise, mean, line, marker="o", markersize=4, color=color, label=method)
            curve.fill_between(self.values.noise, mean - deviation, mean + deviation, color=color, alpha=0.2, lw=0)
        curve.axhline(0.5, color=PAPER, linewidth=1, linestyle=":", label="chance")
        curve.set(title="Accuracy under noise", xlabel="standard deviation of the noise", ylim=(0.45, 1.0))
        legend([plane, *histograms, curve])
        return figure


class Projection(NamedTuple):
    """A fitted map from the plane to one number, and scikit-learn's logistic regression on that number.

    ``direction`` is a (2,) unit vector, ``centre`` (2,) the point that maps to zero.
    """

    direction: Points
    centre: Points
    classifier: Any

    def __call__(self, points: Points) -> Points:
        """Project (n, 2) points to (n, 1) numbers."""
        projected: Points = (points - self.centre) @ self.direction[:, None]
        return projected


def draw(settings: ToyConfig, rng: np.random.Generator) -> tuple[Points, NDArray[np.int64]]:
    """Both classes: points (2 * samples, 2) and labels (2 * samples,) of 0 and 1."""
    labels = np.repeat(np.arange(2), settings.samples)
    points = rng.standard_normal((2 * settings.samples, 2)) * settings.spread
    points += np.where(labels[:, None] == 1, 1.0, -1.0) * settings.offset
    turn = np.deg2rad(settings.angle)
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]), labels


def fit(method: str, points: Points, labels: NDArray[np.int64]) -> Projection:
    """Fit PCA or LDA to clean points (n, 2), and a logistic regression to the projected numbers.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    if method == "PCA":
        fitted = require("sklearn.decomposition", "eval", "The toy figure").PCA(n_components=1).fit(points)
        direction = fitted.components_[0]
    else:
        analysis = require("sklearn.discriminant_analysis", "eval", "The toy figure")
        direction = analysis.LinearDiscriminantAnalysis(n_components=1).fit(points, labels).scalings_[:, 0]
    direction = direction / np.linalg.norm(direction)
    # a direction has no sign of its own; class 1 goes to the right
    difference = points[labels == 1].mean(axis=0) - points[labels == 0].mean(axis=0)
    direction = direction * (1.0 if direction @ difference >= 0 else -1.0)
    regression = require("sklearn.linear_model", "eval", "The toy figure").LogisticRegression()
    projection = Projection(direction, points.mean(axis=0), regression)
    regression.fit(projection(points), labels)
    return projection


@timed
def toy(settings: ToyConfig | None = None) -> Toy:
    """Fit on clean points and test on fresh points under growing noise, ``repeats`` times."""
    settings = settings or ToyConfig()
    scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for repeat in range(settings.repeats):
        rng = np.random.default_rng([settings.seed, repeat])
        points, labels = draw(settings, rng)
        tested, tested_labels = draw(settings, rng)
        noise = rng.standard_normal(tested.shape)
        for method in METHODS:
            projection = fit(method, points, labels)
            noisy = [projection(tested + level * noise) for level in settings.noise]
            scores[method].append([projection.classifier.score(numbers, tested_labels) for numbers in noisy])
    mean, deviation = ({m: f(v, axis=0).tolist() for m, v in scores.items()} for f in (np.mean, np.std))
    return Toy(
        title="PCA and LDA projections of two classes under noise (paper, Fig. 5)",
        values=ToyValues(settings.noise, mean, deviation),
        settings=to_dict(settings),
        notes=(
            "The paper does not publish the numbers behind its figure: means, spreads, sample counts, noise levels and "
            "the classifier (logistic regression on the projected number, fitted without noise) are this project's "
            "choice.",
        ),
    )
