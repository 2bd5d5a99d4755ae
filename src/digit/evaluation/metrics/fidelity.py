"""How close generated images are to real ones: FID, sFID, KID, Inception Score, precision and recall.

torch-fidelity's functions compute all but sFID, which is the same distance of spatial features (arXiv 2103.03841), and
FID∞ (arXiv 1911.07023). The paper measures with torch-fidelity against ImageNet's validation images; most others
measure with ADM's evaluator against the training images. Numbers of the two must not be compared, so a result always
names tool, weights, reference, counts and preprocessing. ``docs/evaluation.md`` has the details.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.config import config, to_dict
from digit.core.errors import DigitError, require
from digit.core.files import read_json
from digit.evaluation.metrics.features import FEW, Source, is_statistics, measure
from digit.evaluation.metrics.inception import TorchExtractor, open_extractor, tool_name
from digit.evaluation.metrics.statistics import FeatureSet, FeatureStatistics, npz_arrays
from digit.evaluation.results import Result, Rows, provenance, timed
from digit.pipeline.image_array import ImageArray

METRICS = ("fid", "sfid", "kid", "prc", "isc")
TITLES = {
    "fid": "FID ↓",
    "fid_infinity": "FID∞ ↓",
    "sfid": "sFID ↓",
    "kid_mean": "KID ↓",
    "kid_std": "KID, deviation",
    "is_mean": "Inception Score ↑",
    "is_std": "Inception Score, deviation",
    "is_adm": "Inception Score as ADM's evaluator splits ↑",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "f_score": "F-score ↑",
}
_FIRST_VALUE = {"fid": "fid", "sfid": "sfid", "kid": "kid_mean", "prc": "precision", "isc": "is_mean"}
ADM_SPLIT = 5000
"""Images in each part of ADM's Inception Score, taken in order (openai/guided-diffusion at 1b61a43)."""


@config
class FidelityOptions:
    """What is measured and how; the defaults are torch-fidelity's.

    Attributes:
        metrics: any of fid, sfid, kid, prc (precision and recall) and isc (Inception Score).
        batch_size: images a step of the network; the values do not depend on it.
        kid_subsets, kid_subset_size: how many random subsets KID averages over, and images in each.
        prc_neighbours: a ball reaches to the k-th nearest neighbour.
        isc_splits: parts whose scores are averaged.
        seed: of the subsets and of the shuffle before the splits.
        extrapolate: also FID∞ where there are at most 10,000 images.
    """

    metrics: tuple[str, ...] = ("fid",)
    batch_size: int = 64
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    prc_neighbours: int = 3
    isc_splits: int = 10
    seed: int = 2020
    extrapolate: bool = True


@dataclass(frozen=True, kw_only=True)
class Fidelity(Result):
    """The values, as far as they were asked for, and everything that decides whether two results may be compared.

    Attributes:
        not_measured: metric -> the reason, in a sentence.
        source, reference: name, number of images, filter of resizing, and for saved statistics what their file says.
        tool, backend, weights, preprocessing, options: how.
        sampling: the run, where a model was measured or what it generated.
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
        rows = {title: f"{self.values[name]:.4f}" for name, title in TITLES.items() if name in self.values}
        rows |= {TITLES[_FIRST_VALUE[metric]]: reason for metric, reason in self.not_measured.items()}
        for side, given in (("Source", self.source), ("Reference", self.reference)):
            if given:
                count = "unknown number of" if given["images"] is None else f"{given['images']:,}"
                how = given.get("filter")
                resized = ", not resized" if how == "none" else f", resized with the {how} filter" if how else ""
                rows[side] = f"{given['name']}: {count} images{resized}"
        rows |= {"Tool": f"{self.tool}, {self.backend}", "Preprocessing": self.preprocessing}
        if self.weights:
            rows["Weights"] = f"{self.weights['source']}, sha256 {self.weights['sha256'][:12]}"
        return [{"": name, "value": value} for name, value in rows.items()]

    def provenance(self) -> str:
        """Model, images and settings, the reference, and the network."""
        network = f"InceptionV3, weights {self.weights['sha256'][:12]}" if self.weights else None
        return provenance(self.model, self.source, self.reference, network, self.sampling)


@timed
def fidelity(
    source: Source,
    reference: Source | None,
    *,
    extractor: TorchExtractor | None = None,
    options: FidelityOptions | None = None,
    source_name: str | None = None,
    source_split: str | None = None,
    total: int | None = None,
    reference_name: str | None = None,
    reference_split: str | None = None,
    reference_total: int | None = None,
) -> Fidelity:
    """Measure images against a reference, as in the paper's tables 3 and 4.

    Args:
        source: what is measured; what both sides may be, with their names and splits, says
            :func:`~digit.evaluation.metrics.features.measure`.
        reference: the real images, whose statistics are cached; None measures the Inception Score alone.
        extractor: the network; by default :func:`~digit.evaluation.metrics.inception.open_extractor` where it is
            needed.
        total: take at most so many source images.
        reference_total: take at most so many real images, spread over theirs.

    Raises:
        DigitError: unknown metrics, unreadable sources, fewer than two images, mixed sizes, or features of another
            width.
    """
    options = options or FidelityOptions()
    if not options.metrics:
        raise DigitError(
            "No metric was asked for; give a reference for fid, sfid, kid or prc, or ask for isc, which needs none."
        )
    if unknown := sorted(set(options.metrics) - set(METRICS)):
        raise DigitError(f"The metrics {', '.join(unknown)} were asked for; known are {', '.join(METRICS)}.")
    sides = [side for side in (source, reference) if side is not None]
    if extractor is None and not all(is_statistics(side, options.metrics) for side in sides):
        extractor = open_extractor()
    theirs = None
    if reference is not None:
        wanted = [metric for metric in options.metrics if metric != "isc"]  # it looks at no real image
        theirs = measure(
            reference, extractor, wanted, batch_size=options.batch_size, name=reference_name, split=reference_split,
            total=reference_total, spread=True, cache=True,
        )  # fmt: skip
        if extractor is not None and not is_statistics(source):  # now, and not after the long part
            _check_width(theirs, extractor.width)
    how: dict[str, Any] = {"batch_size": options.batch_size, "name": source_name, "split": source_split, "total": total}
    ours = measure(source, extractor, options.metrics, **how)
    return replace(compare(ours, theirs, options), sampling=_sampling(source))


def _sampling(source: Source) -> dict[str, Any] | None:
    """What ``digit generate`` noted beside or inside its images; None for others."""
    if not isinstance(source, (str, Path)) or not Path(source).exists():
        return None
    about, record = {}, Path(source) / "generation.json"
    if record.is_file():
        about = read_json(record)
    elif Path(source).suffix == ".npz" and "arr_0" in npz_arrays(source):
        about = ImageArray(source).about
    kept = {name: about[name] for name in ("model", "num", "decoder", "settings", "stages") if name in about}
    return {**kept, "labels": about.get("labelling") or about.get("labels")} if kept else None


@timed
def compare(ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions) -> Fidelity:
    """Compute the metrics between two measured sets; one reference can serve many comparisons.

    Raises:
        DigitError: the two have features of different widths.
    """
    if theirs is not None:
        _check_width(theirs, len(ours.statistics.mu))
    reasons = {metric: _reason_against(metric, ours, theirs, options) for metric in options.metrics}
    values: dict[str, float] = {}
    for metric in (metric for metric, reason in reasons.items() if not reason):
        values |= _metric(metric, ours, theirs, options)
    made_with = dict.fromkeys(("weights_sha256", "weights_source", "backend", "preprocessing"), "unknown")
    made_with |= ours.statistics.metadata
    return Fidelity(
        title=f"Fidelity of {ours.name}" + (f" against {theirs.name}" if theirs else ""),
        values=values,
        not_measured={metric: f"not measured: {reason}" for metric, reason in reasons.items() if reason},
        source=_describe(ours),
        reference=_describe(theirs) if theirs else None,
        tool=tool_name(),
        backend=made_with["backend"],
        weights={"source": made_with["weights_source"], "sha256": made_with["weights_sha256"]},
        preprocessing=made_with["preprocessing"],
        options=to_dict(options),
        notes=tuple(_notes(ours, theirs, values)),
        images_per_second=ours.statistics.n / ours.seconds if ours.seconds and ours.statistics.n else None,
    )


def _check_width(reference: FeatureSet, width: int) -> None:
    found = len(reference.statistics.mu)
    if found != width:
        raise DigitError(
            f"The reference {reference.name} has features of width {found}, the images' have {width}; expected "
            "statistics of the same network (InceptionV3 pool features have 2048)."
        )


def _reason_against(metric: str, ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions) -> str:
    """Why a metric cannot be had from what is there, or the empty string."""
    if metric == "isc":
        if not ours.seconds:
            return f"the source {ours.name} is saved statistics, and the Inception Score needs the images."
        if ours.logits is None and ours.statistics.metadata.get("classifier_head"):
            return f"the source {ours.name} was measured without keeping logits; ask for isc when measuring it."
        if ours.logits is None:
            return (
                "the weights in use have no classifier head, which the Inception Score needs; use torch-fidelity's "
                "full file (--weights public, or its path)."
            )
        splits, count = options.isc_splits, len(ours.logits)
        return f"the Inception Score averages {splits} parts and there are {count} images." if count < splits else ""
    if theirs is None:
        return "no reference was given."
    for name, side in ((f"source {ours.name}", ours), (f"reference {theirs.name}", theirs)):
        rows = side.features
        if metric == "sfid" and side.spatial is None:
            return (
                f"the {name} has no spatial statistics (mu_s, sigma_s); ask for sfid when measuring it, or make the "
                "file with digit evaluate statistics."
            )
        if metric in ("kid", "prc") and rows is None:
            kept = "was measured without keeping features" if side.seconds else "is saved statistics without features"
            return (
                f"the {name} {kept}, and this metric needs the features of every image (digit evaluate statistics "
                "--features keeps them)."
            )
        count = 0 if rows is None else len(rows)
        if metric == "kid" and count < options.kid_subset_size:
            return (
                f"KID draws subsets of {options.kid_subset_size} images and the {name} has {count}; give more images "
                "or a smaller subset size."
            )
        if metric == "prc" and count <= options.prc_neighbours:
            return (
                f"precision and recall look at {options.prc_neighbours} neighbours of each image and the {name} has "
                f"{count} images."
            )
    return ""


# ---- formulas --------------------------------------------------------------------------------------------------------


def _metric(metric: str, ours: FeatureSet, theirs: FeatureSet | None, options: FidelityOptions) -> dict[str, float]:
    """The values of one metric, for which everything is there."""
    if metric == "isc":
        assert ours.logits is not None
        tool = require("torch_fidelity.metric_isc", "eval", "Measuring fidelity")
        found = tool.isc_features_to_metric(ours.logits, options.isc_splits, shuffle=True, rng_seed=options.seed)
        parts = torch.split(ours.logits, ADM_SPLIT)
        scores = [tool.isc_features_to_metric(part, 1, shuffle=False)[tool.KEY_METRIC_ISC_MEAN] for part in parts]
        deviation = found[tool.KEY_METRIC_ISC_STD]
        return {"is_mean": found[tool.KEY_METRIC_ISC_MEAN], "is_std": deviation, "is_adm": float(np.mean(scores))}
    assert theirs is not None
    if metric == "sfid":
        assert ours.spatial is not None
        assert theirs.spatial is not None
        return {"sfid": _frechet(ours.spatial, theirs.spatial)}
    if metric == "fid":
        value = {"fid": _frechet(ours.statistics, theirs.statistics)}
        n = ours.statistics.n or 0
        if options.extrapolate and 20 <= n <= FEW and ours.features is not None:
            value["fid_infinity"] = fid_infinity(ours.features, theirs.statistics, options.seed)
        return value
    if metric == "kid":
        tool = require("torch_fidelity.metric_kid", "eval", "Measuring fidelity")
        how = {"kid_subsets": options.kid_subsets, "kid_subset_size": options.kid_subset_size, "rng_seed": options.seed}
        found = tool.kid_features_to_metric(ours.features, theirs.features, verbose=False, **how)
        return {"kid_mean": found[tool.KEY_METRIC_KID_MEAN], "kid_std": found[tool.KEY_METRIC_KID_STD]}
    tool = require("torch_fidelity.metric_prc", "eval", "Measuring fidelity")
    # in blocks of rows: the full distance matrix of 50,000 images would take 10 GB
    how = {"prc_neighborhood": options.prc_neighbours, "prc_batch_size": 1000, "save_cpu_ram": True}
    found = tool.prc_features_to_metric(ours.features, theirs.features, verbose=False, **how)
    return {name: found[name] for name in ("precision", "recall", "f_score")}


def _frechet(ours: FeatureStatistics, theirs: FeatureStatistics) -> float:
    tool = require("torch_fidelity.metric_fid", "eval", "Measuring fidelity")
    sides = [{"mu": side.mu, "sigma": side.sigma} for side in (ours, theirs)]
    return float(tool.fid_statistics_to_metric(*sides, verbose=False)[tool.KEY_METRIC_FID])


def fid_infinity(features: Tensor, reference: FeatureStatistics, seed: int = 0, points: int = 15) -> float:
    """FID extrapolated to infinitely many images: a line through the FIDs of random subsets over 1 / size, at 0.

    The trace of the covariances' root is the sum of the singular values of the centred features times the reference's
    root. Source: Chong and Forsyth 2020, arXiv 1911.07023, who take 15 sizes from a tenth of the images to all of them.

    Args:
        features: (n, D) of the generated images.
    """
    rows, rng = features.double().numpy(), np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(reference.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # (D, D)
    sizes = np.unique(np.linspace(max(2, len(rows) // 2), len(rows), points).astype(int))
    distances = []
    for size in sizes:
        chosen = rows[rng.choice(len(rows), size, replace=False)]
        centred = (chosen - chosen.mean(0)) / np.sqrt(size - 1)  # (size, D)
        product = centred @ root
        gram = product.T @ product if size > len(root) else product @ product.T
        trace = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
        shift = np.square(chosen.mean(0) - reference.mu).sum()
        distances.append(shift + np.square(centred).sum() + reference.sigma.trace() - 2 * trace)
    return float(np.polyfit(1 / sizes, distances, 1)[1])


# ---- what is said beside the values ----------------------------------------------------------------------------------


def _describe(side: FeatureSet) -> dict[str, Any]:
    metadata = side.statistics.metadata
    return {
        "name": side.name,
        "images": side.statistics.n,
        "filter": metadata.get("filter") or ("none" if "image_size" in metadata else None),
        "statistics": metadata,
    }


def _notes(ours: FeatureSet, theirs: FeatureSet | None, values: dict[str, float]) -> list[str]:
    notes = []
    sides = {"source": ours, "reference": theirs} if theirs else {"source": ours}
    for side, given in sides.items():
        n, width = given.statistics.n, len(given.statistics.mu)
        if n is None:
            notes.append(f"The {side} {given.name} does not say how many images it was made from.")
        elif n <= width:
            notes.append(
                f"The {side} has {n} images: a covariance of {width} features from so few is singular and FID comes "
                "out too high. Compare only with values from as many images; 10,000 to 50,000 are usual."
            )
    if "fid_infinity" in values:
        notes.append(
            f"FID∞ is FID extrapolated from {ours.statistics.n:,} images to infinitely many, a line over 1/n (Chong "
            "and Forsyth 2020); the fewer there are, the rougher it is."
        )
    made_by = {side: given.statistics.metadata.get("weights_sha256") for side, given in sides.items()}
    for side in (side for side, sha256 in made_by.items() if sha256 is None):
        notes.append(f"The {side} {sides[side].name} does not say which InceptionV3 weights made it.")
    if None not in made_by.values() and len(set(made_by.values())) > 1:
        both = ", ".join(f"{side} {str(sha256)[:12]}" for side, sha256 in made_by.items())
        notes.append(f"The two sides were made with different InceptionV3 weights ({both}), so FID means nothing.")
    return notes
