"""How close reconstructions are to their originals, and how well a model gives back real images.

PSNR, SSIM and LPIPS are of pairs, rFID is between the two sets. A model's paths lead through the VQGAN alone, and
through semantic tokens and each decoder; of their tokens stand the share of the codebook that occurs and the entropy.
These are the ceilings of generation (last rows of tables 3 and 4): no prior makes better images than the decoders make
of real tokens. Perturbed tokens show how forgiving decoders are: RobusTok (arXiv 2509.12474) calls the FID under random
replacement of tokens by near ones pFID, the mean over shares and neighbourhoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError, require
from digit.core.images import to_tensor
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.features import Collector, measure
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import TorchExtractor
from digit.evaluation.metrics.noise import perturb_tokens
from digit.evaluation.metrics.stability import SPACES, token_spaces
from digit.evaluation.metrics.statistics import FeatureSet
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size
from digit.evaluation.results import Result, Rows, lines_figure, shown, timed
from digit.models.lpips import Lpips
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.pipeline.tokenizer import VQTokenizer

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
    """Peak signal-to-noise ratio of each pair of (B, 3, H, W) uint8: (B,) float64 in dB, infinite where two are equal.

    Raises:
        DigitError: the two differ in shape, or are not uint8.
    """
    measure = require("skimage.metrics", "eval", "Measuring PSNR").peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return _each(partial(measure, data_range=255), originals, reconstructions)


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each pair as :func:`psnr` takes them, (B,) float64, 1 where two are equal: the Gaussian
    window of Wang et al. 2004 (11 x 11, deviation 1.5), mean of RGB.

    Raises:
        DigitError: as there, or they are smaller than the window.
    """
    measure = require("skimage.metrics", "eval", "Measuring SSIM").structural_similarity
    size = tuple(originals.shape[2:])
    if min(size) < SSIM_WINDOW:
        raise DigitError(f"SSIM needs windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels; the images are {size}.")
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}
    return _each(partial(measure, **how), originals, reconstructions)


def _each(metric: Callable[..., float], originals: Tensor, reconstructions: Tensor) -> Tensor:
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
    sides = (images.permute(0, 2, 3, 1).cpu().numpy() for images in (originals, reconstructions))  # (B, H, W, 3)
    return torch.tensor([metric(a, b) for a, b in zip(*sides, strict=True)], dtype=torch.float64)


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


Numbers = Sequence[int]
METRICS = {
    "rfid": "rFID ↓",
    "psnr": "PSNR, dB ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "usage": "Codebook used ↑",
    "entropy": "Entropy, bits a token ↑",
}
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
NEIGHBOURHOODS = (200 / 4096, 280 / 4096, 360 / 4096)
"""RobusTok's 200, 280 and 360 nearest codes as shares of the codebook; that its codebook has 4,096 entries is an
assumption."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Result):
    """Every path from an image through a model and back; ``settings["perturbation"]`` has FIDs under perturbation."""

    plot: ClassVar[str] = "perturbation.png"
    kind: str = "reconstruction"
    values: tuple[Reconstructed, ...]

    @property
    def perturbed(self) -> list[dict[str, Any]]:
        """By space: ``pfid`` (the mean), ``codes`` and ``points`` of share, neighbours and fid."""
        return list(self.settings.get("perturbation") or ())

    def rows(self) -> Rows:
        rows: Rows = [
            {"Path": one.name, **{title: _cell(one, key) for key, title in METRICS.items()}, "Images": one.images}
            for one in self.values
        ]
        rows += [
            {"Path": f"{row['space']} tokens, perturbed: pFID", METRICS["rfid"]: row["pfid"]} for row in self.perturbed
        ]
        return rows + [
            {"Path": f"Paper, ImageNet: {row.method}", METRICS["rfid"]: row.fid, "Images": 50_000}
            for row in paper.CEILING
        ]

    def figure(self) -> Any:
        shown_lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in self.perturbed:
            lines = shown_lines.setdefault(f"{SPACES[row['space']]}: pFID {row['pfid']:.2f} ↓", {})
            for point in row["points"]:
                name = f"{point['neighbours']} nearest of {shown(row['codes'])} codes"
                lines.setdefault(name, []).append((100 * point["share"], point["fid"]))
        return lines_figure(shown_lines, "replaced tokens, %", "FID against the originals (lower is better)")


def _cell(one: Reconstructed, metric: str) -> str | None:
    if metric not in one.values:
        return None
    if metric == "usage":
        return f"{one.values[metric]:.1%}"
    error = f" ±{shown(one.errors[metric], 2)}" if metric in one.errors else ""
    return shown(one.values[metric]) + error


@dataclass(frozen=True)
class Way:
    """A path from images through "vq" or "semantic" tokens and back.

    Attributes:
        share: of the tokens, which are replaced by one of the ``neighbours`` nearest codes; 0 neighbours for none.
        seed: of that choice and of the decoder.
        decoder: its kind; None for the default one.
    """

    pipe: DigitPipeline
    space: str
    share: float = 0
    neighbours: int = 0
    seed: int = 0
    decoder: str | None = None

    @property
    def tokenizer(self) -> Any:
        """What makes its tokens."""
        return VQTokenizer(self.pipe.part("vqgan")) if self.space == "vq" else self.pipe.tokenizer

    def encode(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Images (B, 3, S, S) in 0..1, and their numbers, to tokens (B, N)."""
        if not self.neighbours:
            return self.tokenizer.encode(images)  # type: ignore[no-any-return]
        of = token_spaces(self.pipe)[self.space]
        return perturb_tokens(
            of.features(images), of.codebook.centroids, self.share, self.neighbours, numbers, self.seed
        )

    def decode(self, tokens: Tensor, numbers: Numbers) -> Tensor:
        """Tokens to images (B, 3, S, S) uint8."""
        if self.space == "vq":
            return as_uint8(self.pipe.to_pixels(Tokens(vq=tokens)))
        return as_uint8(self.pipe.decode(tokens, self.seed, self.decoder, images=numbers))

    def __call__(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Images and their numbers to reconstructions (B, 3, S, S) uint8."""
        return self.decode(self.encode(images, numbers), numbers)


def paths(pipe: DigitPipeline, seed: int = 0) -> dict[str, Way]:
    """The paths from an image through a model and back: by name, the VQGAN first.

    Raises:
        DigitError: the model has no VQGAN, and no decoder that does without.
    """
    found: dict[str, Way] = {}
    if pipe.vqgan is None:
        pipe.stage2().check_parts()
    else:
        found["VQGAN alone"] = Way(pipe, "vq")
    if pipe.space == "semantic" and pipe.encoder is not None and pipe.codebook is not None:
        for kind in pipe.decoders:
            found[f"semantic tokens, {kind} decoder"] = Way(pipe, "semantic", seed=seed, decoder=kind)
    return found


@torch.inference_mode()
def _pairs(
    pipe: DigitPipeline, dataset: ImageDataset, way: Way, batch_size: int, counts: Tensor | None = None
) -> Iterator[Pair]:
    """Originals and reconstructions; adds how often each code was used to ``counts`` (K,)."""
    for batch in image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8):
        images, numbers = to_tensor(batch.images.movedim(1, -1).numpy()).to(pipe.device), batch.indices.tolist()
        tokens = way.encode(images, numbers)
        if counts is not None:
            counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
        yield batch.images, way.decode(tokens, numbers)


def codebook_values(counts: Tensor) -> dict[str, float]:
    """``usage``, the share of codes that occur, and ``entropy`` in bits, from how often each of them does (K,)."""
    shares = counts.double() / counts.sum()
    return {
        "usage": float((counts > 0).double().mean()),
        "entropy": float(torch.special.entr(shares).sum() / math.log(2)),
    }


@timed
def model_reconstruction(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    extractor: TorchExtractor | None,
    lpips: Lpips | None,
    reasons: Mapping[str, str] | None = None,
    perturb: bool = False,
    shares: Sequence[float] = SHARES,
    neighbourhoods: Sequence[float] = NEIGHBOURHOODS,
    seed: int = 0,
    batch_size: int = 64,
) -> Reconstruction:
    """Measure every path of :func:`paths` with :func:`reconstruction`.

    Args:
        perturb: also the FID under perturbation, of VQ tokens and, where there is a decoder, of semantic tokens.
        shares: of the tokens that are then replaced.
        neighbourhoods: from how many nearest codes, as shares of the codebook; at least 2 codes.
        seed: of the decoders and of the perturbation.

    Raises:
        DigitError: no VQGAN, too few images, or perturbation without the FID network.
    """
    if perturb and extractor is None:
        raise DigitError(
            f"FID under perturbation needs the FID network: {(reasons or {}).get('rfid', 'none was given.')}"
        )
    ways, total, theirs = paths(pipe, seed), len(dataset), None
    if extractor is not None:
        batches = image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8)
        theirs = measure((batch.images for batch in batches), extractor, (), name="originals", total=total)

    def compared(name: str, way: Way) -> Reconstructed:
        counts = torch.zeros(way.tokenizer.vocab_size, dtype=torch.long)
        pairs = _pairs(pipe, dataset, way, batch_size, counts)
        found = reconstruction(
            pairs, extractor=extractor, originals=theirs, lpips=lpips, reasons=reasons, total=total, name=name
        )
        return replace(found, values={**found.values, **codebook_values(counts)})

    def fid(space: str, share: float, neighbours: int) -> float:
        pairs = _pairs(pipe, dataset, Way(pipe, space, share, neighbours, seed), batch_size)
        name = f"{space}, {share:.0%} of the tokens, {neighbours} codes"
        made = measure((images for _, images in pairs), extractor, (), name=name, total=total)
        return compare(made, theirs, RFID).values["fid"]

    values = [compared(*way) for way in ways.items()]
    perturbed = []
    for space, tokens_of in reversed(token_spaces(pipe).items() if perturb else ()):  # VQ first, as in the table
        if space == "vq" or pipe.decoders:
            codes = len(tokens_of.codebook.centroids)
            sizes = dict.fromkeys(max(2, round(part * codes)) for part in neighbourhoods)
            points = [{"share": s, "neighbours": n, "fid": fid(space, s, n)} for n in sizes for s in shares]
            mean = sum(point["fid"] for point in points) / len(points)
            perturbed.append({"space": space, "codes": codes, "pfid": mean, "points": points})
    ceiling = {row.method: row.fid for row in paper.CEILING}
    against = {"name": "the originals", "weights": extractor.weights.sha256} if extractor is not None else None
    return Reconstruction(
        title=f"Reconstruction of {total:,} images (last rows of tables 3 and 4)",
        values=tuple(values),
        settings={"seed": seed, "batch_size": batch_size, "perturbation": perturbed, "reference": against},
        model=describe_model(pipe),
        data=describe_data(dataset, pipe),
        paper={"source": f"{paper.SOURCE}, tables 3 and 4: FID, ImageNet validation images", **ceiling},
        notes=tuple(dict.fromkeys(n for row in values for n in (*row.notes, *row.not_measured.values()))),
    )
