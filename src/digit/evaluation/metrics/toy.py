"""The paper's toy figure: two overlapping classes in the plane, projected to one number by PCA and by LDA.

PCA keeps the direction of the largest variance, as a reconstructing autoencoder does; LDA keeps the one that separates
the classes, as discriminative self-supervision does. Under growing noise the discriminative projection stays the better
one.

The paper shows this figure (Fig. 5) without its numbers. Means, spreads, sample counts, noise levels and the classifier
are therefore this project's choice; :class:`ToyConfig` holds them all, and every result repeats them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from digit.core.config import config, to_dict
from digit.core.errors import require
from digit.evaluation.result import OTHER, OURS, Record, figure

Points = NDArray[np.float64]
PLOT = "pca-lda.png"
METHODS = ("PCA", "LDA")


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
class Projection:
    """A fitted map from the plane to one number, with a classifier on that number.

    Attributes:
        direction: (2,) unit vector.
        centre: (2,) the point that maps to zero.
        classifier: scikit-learn's logistic regression on the projected number.
    """

    direction: Points
    centre: Points
    classifier: Any

    def __call__(self, points: Points) -> Points:
        """Project (n, 2) points to (n,) numbers."""
        projected: Points = (points - self.centre) @ self.direction
        return projected

    def accuracy(self, points: Points, labels: NDArray[np.int64]) -> float:
        """Share of (n, 2) points whose class is told correctly from the projected number alone."""
        return float(self.classifier.score(self(points)[:, None], labels))


@dataclass(frozen=True)
class ToyResult:
    """Accuracy under noise, and one draw to look at.

    Attributes:
        noise: the levels.
        accuracy: method -> mean accuracy at each level.
        deviation: method -> standard deviation over the repeats.
    """

    noise: tuple[float, ...]
    accuracy: dict[str, list[float]]
    deviation: dict[str, list[float]]


def draw(settings: ToyConfig, rng: np.random.Generator) -> tuple[Points, NDArray[np.int64]]:
    """Both classes: points (2 * samples, 2) and labels (2 * samples,) of 0 and 1."""
    labels = np.repeat(np.arange(2), settings.samples)
    points = rng.standard_normal((2 * settings.samples, 2)) * settings.spread
    points += np.where(labels[:, None] == 1, 1.0, -1.0) * settings.offset
    turn = np.deg2rad(settings.angle)
    return points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]), labels


def fit(method: str, points: Points, labels: NDArray[np.int64]) -> Projection:
    """Fit PCA or LDA to clean points (n, 2), and a logistic regression to the projected numbers."""
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
    centre = points.mean(axis=0)
    regression = require("sklearn.linear_model", "eval", "The toy figure").LogisticRegression()
    return Projection(direction, centre, regression.fit(((points - centre) @ direction)[:, None], labels))


def run(settings: ToyConfig) -> ToyResult:
    """Fit on clean points and test on fresh points under growing noise, ``repeats`` times."""
    scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for repeat in range(settings.repeats):
        rng = np.random.default_rng([settings.seed, repeat])
        points, labels = draw(settings, rng)
        tested, tested_labels = draw(settings, rng)
        noise = rng.standard_normal(tested.shape)
        noisy = [tested + level * noise for level in settings.noise]
        for method in METHODS:
            projection = fit(method, points, labels)
            scores[method].append([projection.accuracy(seen, tested_labels) for seen in noisy])
    means = {method: np.mean(values, axis=0).tolist() for method, values in scores.items()}
    return ToyResult(
        settings.noise, means, {method: np.std(values, axis=0).tolist() for method, values in scores.items()}
    )


def pca_lda(out: str | Path, settings: ToyConfig | None = None) -> ToyResult:
    """Make the figure: ``pca-lda.png`` and ``result.json`` in the folder ``out``.

    Raises:
        MissingPackageError: scikit-learn or matplotlib is not installed.
    """
    settings, began = settings or ToyConfig(), time.monotonic()
    result = run(settings)
    plot(result, settings, Path(out) / PLOT)
    Record(
        kind="toy",
        title="PCA and LDA projections of two classes under noise (paper, Fig. 5)",
        values=asdict(result),
        settings=to_dict(settings),
        notes=[
            "The paper does not publish the numbers behind its figure: means, spreads, sample counts, noise levels and the "
            "classifier (logistic regression on the projected number, fitted without noise) are this project's choice."
        ],
        plots=[PLOT],
        seconds=time.monotonic() - began,
    ).write(out)
    return result


def plot(result: ToyResult, settings: ToyConfig, path: Path) -> None:
    """Draw the classes with both directions, the two projections, and accuracy against noise."""
    points, labels = draw(settings, np.random.default_rng([settings.seed, 0]))
    projections = {method: fit(method, points, labels) for method in METHODS}
    styles = {"PCA": (OTHER, "--"), "LDA": (OURS, "-")}
    classes = ("#5b8def", "#e2893b")
    with figure(path, columns=4, size=(3.9, 3.7)) as axes:
        for label, colour in enumerate(classes):
            shown = points[labels == label][:300]
            axes[0].scatter(*shown.T, s=8, color=colour, alpha=0.6, linewidths=0, label=f"class {label}")
        for method, projection in projections.items():
            ends = projection.centre + np.outer([-5.5, 5.5], projection.direction)
            axes[0].plot(
                *ends.T, color="black", linestyle=styles[method][1], linewidth=1.6, label=f"{method} direction"
            )
        axes[0].set(title="Two classes in the plane", aspect="equal", xlim=(-10.5, 10.5), ylim=(-10.5, 10.5))
        axes[0].legend(fontsize=8, loc="upper left", framealpha=0.9)
        for axis, (method, projection) in zip(axes[1:3], projections.items(), strict=True):
            values = projection(points)
            bins = np.linspace(values.min(), values.max(), 50)
            for label, colour in enumerate(classes):
                axis.hist(values[labels == label], bins, color=colour, alpha=0.6, label=f"class {label}")
            axis.set(title=f"{method}: accuracy {result.accuracy[method][0]:.1%}", xlabel="projected number", yticks=[])
        for method in METHODS:
            mean, deviation = np.array(result.accuracy[method]), np.array(result.deviation[method])
            colour, line = styles[method]
            axes[3].plot(result.noise, mean, line, marker="o", markersize=4, color=colour, label=method)
            axes[3].fill_between(result.noise, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        axes[3].axhline(0.5, color="#8a8f98", linewidth=1, linestyle=":")
        axes[3].set(title="Accuracy under noise", xlabel="standard deviation of the noise", ylim=(0.45, 1.0))
        axes[3].legend()
