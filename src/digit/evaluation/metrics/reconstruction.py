"""How close reconstructions are to their originals: PSNR, SSIM, LPIPS pair by pair, and rFID between the two sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError, require
from digit.core.progress import bar
from digit.evaluation.metrics.features import Collector, FeatureSet
from digit.evaluation.metrics.fidelity import FidelityOptions, FidelityResult, compare
from digit.evaluation.metrics.inception import FeatureExtractor
from digit.models.lpips import Lpips

Pair = tuple[Tensor, Tensor]
SSIM_WINDOW = 11


@dataclass
class ReconstructionResult:
    """Means over the images.

    Attributes:
        images: how many pairs.
        values: psnr (dB), ssim, lpips and rfid, as far as they were measured.
        errors: the standard error of each mean over images; rfid has none.
        not_measured: metric -> the reason, in a sentence.
        methods: metric -> package, version and settings.
        identical: pairs without any difference; PSNR is infinite there and its mean leaves them out.
        fidelity: everything about the rFID.
    """

    images: int
    values: dict[str, float]
    errors: dict[str, float]
    not_measured: dict[str, str]
    methods: dict[str, str]
    identical: int
    fidelity: FidelityResult | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": "reconstruction", "title": f"Reconstruction of {self.images:,} images", **asdict(self)}


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair.

    Args:
        originals: (B, 3, H, W) uint8.
        reconstructions: of the same shape and type.

    Returns:
        (B,) float64 in dB, infinite where the two are equal.

    Raises:
        DigitError: the two differ in shape, or are not uint8.
    """
    measure = require("skimage.metrics", "eval", "Measuring PSNR").peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return torch.tensor(
            [measure(a, b, data_range=255) for a, b in _arrays(originals, reconstructions)], dtype=torch.float64
        )


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each pair, with the Gaussian window of Wang et al. 2004 (11 x 11, deviation 1.5), mean
    of RGB.

    Args and errors are those of :func:`psnr`.

    Returns:
        (B,) float64, 1 where the two are equal.
    """
    measure = require("skimage.metrics", "eval", "Measuring SSIM").structural_similarity
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
        "channel_axis": 2,
    }
    if min(originals.shape[2:]) < SSIM_WINDOW:
        raise DigitError(
            f"SSIM looks at windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels; the images are {tuple(originals.shape[2:])}."
        )
    return torch.tensor(
        [measure(a, b, **settings) for a, b in _arrays(originals, reconstructions)], dtype=torch.float64
    )


def _arrays(originals: Tensor, reconstructions: Tensor) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    _check_pair(originals, reconstructions)
    sides = (images.permute(0, 2, 3, 1).cpu().numpy() for images in (originals, reconstructions))  # (B, H, W, 3)
    return zip(*sides, strict=True)


def _check_pair(originals: Tensor, reconstructions: Tensor) -> None:
    for images in (originals, reconstructions):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise DigitError(
                f"Images of shape {tuple(images.shape)}, {images.dtype} were given; expected (B, 3, H, W) uint8 RGB."
            )
    if originals.shape != reconstructions.shape:
        raise DigitError(
            f"Originals {tuple(originals.shape)} and reconstructions {tuple(reconstructions.shape)} differ in shape; "
            "compare them at the size the model works at."
        )


def reconstruction(
    pairs: Iterable[Pair],
    *,
    extractor: FeatureExtractor | None = None,
    originals: FeatureSet | None = None,
    lpips: Lpips | None = None,
    reasons: Mapping[str, str] | None = None,
    total: int | None = None,
    name: str = "reconstructions",
) -> ReconstructionResult:
    """Measure a stream of (originals, reconstructions), each (B, 3, H, W) uint8; nothing but sums is kept.

    Args:
        pairs: batches, such as a VQGAN's input and output.
        extractor: the FID network; None leaves out rFID.
        originals: all originals as that network sees them, where several sets of reconstructions have the same; None
            measures them.
        lpips: the LPIPS network; None leaves out LPIPS.
        reasons: for rfid and lpips, why they are left out, such as the sentence of the loader that failed.
        total: number of pairs, for the progress bar.
        name: of the reconstructions.

    Raises:
        DigitError: no pairs, or pairs that do not fit each other.
    """
    scores: dict[str, list[Tensor]] = {metric: [] for metric in ("psnr", "ssim", *(["lpips"] if lpips else []))}
    measures: dict[str, Any] = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    ours = Collector(extractor) if extractor else None
    theirs = Collector(extractor) if extractor and originals is None else None
    with bar(f"Comparing {name}", total) as progress:
        for pair in pairs:
            _check_pair(*pair)
            for metric, found in scores.items():
                found.append(measures[metric](*pair).double())
            for collector, images in zip((theirs, ours), pair, strict=True):
                if collector is not None:
                    collector.add(images)
            progress.advance(len(pair[0]))
    if not scores["psnr"]:
        raise DigitError("No pairs of original and reconstruction were given.")
    merged = {metric: torch.cat(found) for metric, found in scores.items()}
    rfid = None
    if theirs is not None:
        originals = theirs.finish(f"originals of {name}")
    if ours is not None and originals is not None:
        rfid = compare(ours.finish(name), originals, FidelityOptions())
    return _summarise(merged, rfid, lpips, reasons or {})


def _summarise(
    scores: dict[str, Tensor], rfid: FidelityResult | None, lpips: Lpips | None, reasons: Mapping[str, str]
) -> ReconstructionResult:
    images = len(scores["psnr"])
    differing = scores["psnr"].isfinite()
    scores = {**scores, "psnr": scores["psnr"][differing]}
    missing = {"lpips": "no LPIPS network was given.", "rfid": "no FID network was given."} | dict(reasons)
    values = {metric: float(found.mean()) for metric, found in scores.items() if len(found)}
    not_measured = {metric: f"not measured: {missing[metric]}" for metric in ("lpips", "rfid") if metric not in values}
    if "psnr" not in values:
        not_measured["psnr"] = "not measured: every reconstruction equals its original, so PSNR is infinite."
    if rfid is not None:
        values["rfid"] = rfid.values["fid"]
        del not_measured["rfid"]
    skimage = f"scikit-image {version('scikit-image')}"
    methods = {
        "psnr": f"{skimage}, uint8 RGB, mean over images",
        "ssim": f"{skimage}, Gaussian window 11 x 11 with deviation 1.5, mean over RGB",
    }
    if lpips is not None:
        methods["lpips"] = lpips.description
    if rfid is not None:
        methods["rfid"] = f"{rfid.tool}, {rfid.backend}, weights sha256 {rfid.weights['sha256'][:12]}"
    same = images - int(differing.sum())
    notes = (
        [f"{same} of {images} reconstructions equal their originals; the mean of PSNR leaves them out."] if same else []
    )
    errors = {metric: float(found.std() / len(found) ** 0.5) for metric, found in scores.items() if len(found) > 1}
    return ReconstructionResult(
        images, values, errors, not_measured, methods, same, rfid, notes + (rfid.notes if rfid else [])
    )
