"""How close reconstructions are to their originals: PSNR, SSIM, LPIPS pair by pair, and rFID between the two sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError, require
from digit.core.progress import bar
from digit.evaluation.metrics.features import Collector
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import TorchExtractor
from digit.evaluation.metrics.statistics import FeatureSet
from digit.models.lpips import Lpips

Pair = tuple[Tensor, Tensor]
SSIM_WINDOW = 11
RFID = FidelityOptions(extrapolate=False)
"""Two sets of the same images, whose number is part of what rFID is."""


@dataclass(frozen=True)
class Reconstructed:
    """Means over pairs of an original and its reconstruction.

    Attributes:
        name: of the reconstructions.
        images: how many pairs.
        values: psnr (dB), ssim, lpips and rfid, as far as they were measured; of a model's path also usage of the
            codebook (a share) and entropy of the tokens (bits).
        errors: the standard error of each mean over images; rfid has none.
        not_measured: metric -> the reason, in a sentence.
        methods: metric -> package, version and settings.
        identical: pairs without any difference; PSNR is infinite there and its mean leaves them out.
        fidelity: everything about the rFID.
    """

    name: str
    images: int
    values: dict[str, float]
    errors: dict[str, float]
    not_measured: dict[str, str]
    methods: dict[str, str]
    identical: int
    fidelity: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, from two (B, 3, H, W) uint8.

    Returns:
        (B,) float64 in dB, infinite where the two are equal.

    Raises:
        DigitError: the two differ in shape, or are not uint8.
    """
    measure = require("skimage.metrics", "eval", "Measuring PSNR").peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return _each(partial(measure, data_range=255), originals, reconstructions)


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each pair, from two (B, 3, H, W) uint8: the Gaussian window of Wang et al. 2004 (11 x
    11, deviation 1.5), mean of RGB.

    Returns:
        (B,) float64, 1 where the two are equal.

    Raises:
        DigitError: the two differ in shape, are not uint8, or are smaller than the window.
    """
    measure = require("skimage.metrics", "eval", "Measuring SSIM").structural_similarity
    size = tuple(originals.shape[2:])
    if min(size) < SSIM_WINDOW:
        raise DigitError(f"SSIM needs windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels; the images are {size}.")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}
    return _each(partial(measure, **how), originals, reconstructions)


def _each(metric: Callable[..., float], originals: Tensor, reconstructions: Tensor) -> Tensor:
    _check_pair(originals, reconstructions)
    sides = (images.permute(0, 2, 3, 1).cpu().numpy() for images in (originals, reconstructions))  # (B, H, W, 3)
    return torch.tensor([metric(a, b) for a, b in zip(*sides, strict=True)], dtype=torch.float64)


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
    extractor: TorchExtractor | None = None,
    originals: FeatureSet | None = None,
    lpips: Lpips | None = None,
    reasons: Mapping[str, str] | None = None,
    total: int | None = None,
    name: str = "reconstructions",
) -> Reconstructed:
    """Measure a stream of (originals, reconstructions), each (B, 3, H, W) uint8; nothing but sums is kept.

    Args:
        pairs: batches, such as a VQGAN's input and output.
        extractor: the FID network; None leaves out rFID.
        originals: all originals as that network sees them; None measures them.
        lpips: the LPIPS network; None leaves out LPIPS.
        reasons: for rfid and lpips, why they are left out.
        total: number of pairs, for the progress bar.
        name: of the reconstructions.

    Raises:
        DigitError: no pairs, or pairs that do not fit each other.
    """
    measures: dict[str, Any] = {"psnr": psnr, "ssim": ssim} | ({"lpips": lpips} if lpips else {})
    found: dict[str, list[Tensor]] = {metric: [] for metric in measures}
    ours = Collector(extractor, ()) if extractor else None
    theirs = Collector(extractor, ()) if extractor and originals is None else None
    with bar(f"Comparing {name}", total) as progress:
        for pair in pairs:
            for metric, measure in measures.items():
                found[metric].append(measure(*pair).double())
            for collector, side in zip((theirs, ours), pair, strict=True):
                if collector is not None:
                    collector.add(side)
            progress.advance(len(pair[0]))
    if not found["psnr"]:
        raise DigitError("No pairs of original and reconstruction were given.")
    scores = {metric: torch.cat(values) for metric, values in found.items()}
    images = len(scores["psnr"])
    scores["psnr"] = scores["psnr"][scores["psnr"].isfinite()]
    same = images - len(scores["psnr"])
    values = {metric: float(each.mean()) for metric, each in scores.items() if len(each)}
    skimage = f"scikit-image {version('scikit-image')}"
    methods = {
        "psnr": f"{skimage}, uint8 RGB, mean over images",
        "ssim": f"{skimage}, Gaussian window 11 x 11 with deviation 1.5, mean over RGB",
    }
    notes = [f"{same} of {images} reconstructions equal their originals; PSNR leaves them out."] if same else []
    if lpips is not None:
        methods["lpips"] = lpips.description
    rfid = None
    if theirs is not None:
        originals = theirs.finish(f"originals of {name}")
    if ours is not None and originals is not None:
        rfid = compare(ours.finish(name), originals, RFID)
        values["rfid"] = rfid.values["fid"]
        methods["rfid"] = f"{rfid.tool}, {rfid.backend}, weights sha256 {rfid.weights['sha256'][:12]}"
        notes += rfid.notes
    missing = {
        "psnr": "every reconstruction equals its original, so PSNR is infinite.",
        "lpips": "no LPIPS network was given.",
        "rfid": "no FID network was given.",
        **(reasons or {}),
    }
    return Reconstructed(
        name=name,
        images=images,
        values=values,
        errors={metric: float(each.std() / len(each) ** 0.5) for metric, each in scores.items() if len(each) > 1},
        not_measured={metric: f"not measured: {why}" for metric, why in missing.items() if metric not in values},
        methods=methods,
        identical=same,
        fidelity=rfid.to_dict() if rfid else None,
        notes=tuple(notes),
    )
