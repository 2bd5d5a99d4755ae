"""How close generated images are to real ones: FID, KID, Inception Score, precision and recall, computed by
torch-fidelity.

The paper measures with torch-fidelity against ImageNet's validation images; most others measure against ADM's
statistics of the training images. Numbers of the two references must not be compared, so a result always names tool,
weights, reference, counts and preprocessing. ``docs/evaluation.md`` has the details.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from digit.core.config import config, to_dict
from digit.core.errors import DigitError, require
from digit.evaluation.metrics.features import FeatureSet, Source, is_statistics, measure
from digit.evaluation.metrics.inception import FeatureExtractor, open_extractor, tool_name
from digit.evaluation.results import Result, Rows, provenance

METRICS = ("fid", "kid", "prc", "isc")
TITLES = {
    "fid": "FID ↓",
    "kid_mean": "KID ↓",
    "kid_std": "KID, deviation",
    "is_mean": "Inception Score ↑",
    "is_std": "Inception Score, deviation",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "f_score": "F-score ↑",
}
_FIRST_VALUE = {"fid": "fid", "kid": "kid_mean", "prc": "precision", "isc": "is_mean"}


@config
class FidelityOptions:
    """What is measured and how; the defaults are torch-fidelity's.

    Attributes:
        metrics: any of fid, kid, prc (precision and recall) and isc (Inception Score).
        batch_size: images a step of the network; the values do not depend on it.
        kid_subsets, kid_subset_size: how many random subsets KID averages over, and images in each.
        prc_neighbours: a ball reaches to the k-th nearest neighbour.
        isc_splits: parts whose scores are averaged.
        seed: of the subsets and of the shuffle before the splits.
    """

    metrics: tuple[str, ...] = ("fid",)
    batch_size: int = 64
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    prc_neighbours: int = 3
    isc_splits: int = 10
    seed: int = 2020


@dataclass(frozen=True, kw_only=True)
class Fidelity(Result):
    """The values, as far as they were asked for, and everything that decides whether two results may be compared.

    Attributes:
        not_measured: metric -> the reason, in a sentence.
        source, reference: name, number of images, and for saved statistics what their file says.
        tool, backend, weights, preprocessing, options: how.
        sampling: the run, where a model was measured.
    """

    kind: str = "fidelity"
    values: dict[str, float]
    not_measured: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] | None = None
    tool: str = ""
    backend: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    preprocessing: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None
    images_per_second: float | None = None

    def rows(self) -> Rows:
        """A row for each value, for each reason of a missing one, and for what they were measured with."""
        rows = {TITLES[name]: f"{value:.4f}" for name, value in self.values.items()}
        rows |= {TITLES[_FIRST_VALUE[metric]]: reason for metric, reason in self.not_measured.items()}
        for side, given in (("Source", self.source), ("Reference", self.reference)):
            if given:
                count = "unknown number of" if given["images"] is None else f"{given['images']:,}"
                rows[side] = f"{given['name']}: {count} images"
        rows |= {"Tool": f"{self.tool}, {self.backend}", "Preprocessing": self.preprocessing}
        if self.weights:
            rows["Weights"] = f"{self.weights['source']}, sha256 {self.weights['sha256'][:12]}"
        return [{"": name, "value": value} for name, value in rows.items()]

    def provenance(self) -> str:
        """Model, images and settings, the reference, and the network."""
        network = f"weights {self.weights['sha256'][:12]}" if self.weights else None
        return provenance(self.model, self.source, self.reference, network, self.sampling)


def fidelity(
    source: Source,
    reference: Source | None,
    *,
    extractor: FeatureExtractor | None = None,
    options: FidelityOptions | None = None,
    source_name: str | None = None,
    source_split: str | None = None,
    total: int | None = None,
    reference_name: str | None = None,
    reference_split: str | None = None,
) -> Fidelity:
    """Measure images against a reference, as in the paper's tables 3 and 4.

    Args:
        source: what is measured; what both sides may be, with their names and splits, says
            :func:`~digit.evaluation.metrics.features.measure`.
        reference: the real images; None measures the Inception Score alone.
        extractor: the network; by default :func:`~digit.evaluation.metrics.inception.open_extractor` where it is needed.
        total: take at most so many source images.

    Raises:
        DigitError: unknown metrics, unreadable sources, fewer than two images, mixed sizes, or features of another
            width.
    """
    options = options or FidelityOptions()
    if not options.metrics:
        raise DigitError(
            "No metric was asked for; give a reference for fid, kid or prc, or ask for isc, which needs none."
        )
    if unknown := sorted(set(options.metrics) - set(METRICS)):
        raise DigitError(f"The metrics {', '.join(unknown)} were asked for; known are {', '.join(METRICS)}.")
    if extractor is None and not (is_statistics(source) and (reference is None or is_statistics(reference))):
        extractor = open_extractor()
    theirs, began = None, time.monotonic()
    how: dict[str, Any] = {"metrics": options.metrics, "batch_size": options.batch_size}
    if reference is not None:
        theirs = measure(reference, extractor, name=reference_name, split=reference_split, **how)
        if extractor is not None and not is_statistics(source):  # now, and not after the long part
            _check_width(theirs, extractor.width)
    ours = measure(source, extractor, name=source_name, split=source_split, total=total, **how)
    return compare(ours, theirs, options, began)


def compare(
    ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions, began: float | None = None
) -> Fidelity:
    """Compute the metrics between two measured sets; one reference can serve many comparisons.

    ``began`` is the monotonic time from which the seconds of the result are counted; now, if left out.

    Raises:
        DigitError: the two have features of different widths.
    """
    if theirs is not None:
        _check_width(theirs, len(ours.statistics.mu))
    began = time.monotonic() if began is None else began
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for metric in options.metrics:
        reason = _reason_against(metric, ours, theirs, options)
        if reason:
            reasons[metric] = f"not measured: {reason}"
        else:
            values.update(_metric(metric, ours, theirs, options))
    made_with = dict.fromkeys(("weights_sha256", "weights_source", "backend", "preprocessing"), "unknown")
    made_with |= ours.statistics.metadata
    return Fidelity(
        title=f"Fidelity of {ours.name}" + (f" against {theirs.name}" if theirs else ""),
        values=values,
        not_measured=reasons,
        source=_describe(ours),
        reference=_describe(theirs) if theirs else None,
        tool=tool_name(),
        backend=made_with["backend"],
        weights={"source": made_with["weights_source"], "sha256": made_with["weights_sha256"]},
        preprocessing=made_with["preprocessing"],
        options=to_dict(options),
        notes=tuple(_notes(ours, theirs)),
        seconds=time.monotonic() - began,
        images_per_second=ours.statistics.n / ours.seconds if ours.seconds and ours.statistics.n else None,
    )


def _check_width(reference: FeatureSet, width: int) -> None:
    found = len(reference.statistics.mu)
    if found != width:
        raise DigitError(
            f"The reference {reference.name} has features of width {found}, the images' have {width}; expected statistics of "
            "the same network (InceptionV3 pool features have 2048)."
        )


def _reason_against(metric: str, ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions) -> str:
    """Why a metric cannot be had from what is there, or the empty string."""
    if metric == "isc":
        return _reason_against_isc(ours, options)
    if theirs is None:
        return "no reference was given."
    if metric == "fid":
        return ""
    for side, given in (("source", ours), ("reference", theirs)):
        if given.features is None:
            kept = "was measured without keeping features" if given.seconds else "is saved statistics without features"
            return (
                f"the {side} {given.name} {kept}, and this metric needs the features of every image "
                "(digit evaluate statistics --features keeps them)."
            )
        if metric == "kid" and len(given.features) < options.kid_subset_size:
            return (
                f"KID draws subsets of {options.kid_subset_size} images and the {side} {given.name} has {len(given.features)}; "
                "give more images or a smaller subset size."
            )
        if metric == "prc" and len(given.features) <= options.prc_neighbours:
            return (
                f"precision and recall look at {options.prc_neighbours} neighbours of each image and the {side} {given.name} "
                f"has {len(given.features)} images."
            )
    return ""


def _reason_against_isc(ours: FeatureSet, options: FidelityOptions) -> str:
    if not ours.seconds:
        return f"the source {ours.name} is saved statistics, and the Inception Score needs the images."
    if ours.logits is None and ours.statistics.metadata.get("classifier_head"):
        return f"the source {ours.name} was measured without keeping logits; ask for isc when measuring it."
    if ours.logits is None:
        return (
            "the weights in use have no classifier head, which the Inception Score needs; use torch-fidelity's full file "
            "(--weights public, or its path)."
        )
    if len(ours.logits) < options.isc_splits:
        return f"the Inception Score averages {options.isc_splits} parts and there are {len(ours.logits)} images."
    return ""


def _metric(metric: str, ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions) -> dict[str, float]:
    """One metric through torch-fidelity's own function."""
    tool = require(f"torch_fidelity.metric_{metric}", "eval", "Measuring fidelity")
    if metric == "isc":
        found = tool.isc_features_to_metric(ours.logits, options.isc_splits, shuffle=True, rng_seed=options.seed)
        return {"is_mean": found[tool.KEY_METRIC_ISC_MEAN], "is_std": found[tool.KEY_METRIC_ISC_STD]}
    assert theirs is not None
    if metric == "fid":
        sides = [{"mu": side.statistics.mu, "sigma": side.statistics.sigma} for side in (ours, theirs)]
        return {"fid": tool.fid_statistics_to_metric(*sides, verbose=False)[tool.KEY_METRIC_FID]}
    if metric == "kid":
        found = tool.kid_features_to_metric(
            ours.features,
            theirs.features,
            kid_subsets=options.kid_subsets,
            kid_subset_size=options.kid_subset_size,
            rng_seed=options.seed,
            verbose=False,
        )
        return {"kid_mean": found[tool.KEY_METRIC_KID_MEAN], "kid_std": found[tool.KEY_METRIC_KID_STD]}
    # in blocks of rows: the full distance matrix of 50,000 images would take 10 GB
    found = tool.prc_features_to_metric(
        ours.features,
        theirs.features,
        prc_neighborhood=options.prc_neighbours,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": found["precision"], "recall": found["recall"], "f_score": found["f_score"]}


def _describe(side: FeatureSet) -> dict[str, Any]:
    return {"name": side.name, "images": side.statistics.n, "statistics": side.statistics.metadata}


def _notes(ours: FeatureSet, theirs: FeatureSet | None) -> list[str]:
    notes = []
    sides = {"source": ours, "reference": theirs} if theirs else {"source": ours}
    for side, given in sides.items():
        n, width = given.statistics.n, len(given.statistics.mu)
        if n is None:
            notes.append(f"The {side} {given.name} does not say how many images it was made from.")
        elif n <= width:
            notes.append(
                f"The {side} has {n} images: a covariance of {width} features from so few is singular and FID comes out "
                "too high. Compare only with values from as many images; 10,000 to 50,000 are usual."
            )
    made_by = {side: given.statistics.metadata.get("weights_sha256") for side, given in sides.items()}
    for side in (side for side, sha256 in made_by.items() if sha256 is None):
        notes.append(f"The {side} {sides[side].name} does not say which InceptionV3 weights made it.")
    if None not in made_by.values() and len(set(made_by.values())) > 1:
        both = ", ".join(f"{side} {str(sha256)[:12]}" for side, sha256 in made_by.items())
        notes.append(f"The two sides were made with different InceptionV3 weights ({both}), so FID means nothing.")
    return notes
