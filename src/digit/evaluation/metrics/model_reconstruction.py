"""How well a model gives back real images: through the VQGAN alone, and through semantic tokens and each decoder.

Each path has what is usual for tokenizers: rFID, PSNR, SSIM, LPIPS, and of its tokens the share of the codebook that
occurs and the entropy, on the same center-cropped images. These are the ceilings of generation (last rows of tables 3
and 4): no prior makes better images than the decoders make of real tokens. Perturbed tokens show how forgiving decoders
are: RobusTok (arXiv 2509.12474) calls the FID under random replacement of tokens by near ones pFID, the mean over
shares and neighbourhoods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.features import measure
from digit.evaluation.metrics.fidelity import compare
from digit.evaluation.metrics.inception import TorchExtractor
from digit.evaluation.metrics.noise import perturb_tokens
from digit.evaluation.metrics.reconstruction import RFID, Pair, Reconstructed, reconstruction
from digit.evaluation.metrics.stability import SPACES, token_spaces
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size, pixels_of
from digit.evaluation.results import Result, Rows, lines_figure, shown
from digit.models.lpips import Lpips
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.pipeline.tokenizer import VQTokenizer

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
VQGAN_ALONE = "VQGAN alone"


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


# ---- paths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A path from images to tokens and back."""

    encode: Callable[[Tensor, Numbers], Tensor]  # images (B, 3, S, S) in 0..1 and their numbers to tokens (B, N)
    decode: Callable[[Tensor, Numbers], Tensor]  # tokens to images (B, 3, S, S) uint8
    codes: int

    def __call__(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Images and their numbers to reconstructions (B, 3, S, S) uint8."""
        return self.decode(self.encode(images, numbers), numbers)

    @classmethod
    def of(cls, pipe: DigitPipeline, space: str, seed: int, kind: str | None = None) -> Way:
        """Through "vq" tokens and the VQGAN, or through "semantic" ones and a decoder, the default one if none is
        named.
        """
        if space == "vq":
            vqgan = pipe.part("vqgan")
            vq = VQTokenizer(vqgan)
            return cls(lambda x, _: vq.encode(x), lambda t, _: as_uint8(pipe.to_pixels(Tokens(vq=t))), vq.vocab_size)
        tokenizer = pipe.tokenizer
        return cls(
            lambda x, _: tokenizer.encode(x), lambda t, n: pixels_of(pipe, t, n, seed, kind), tokenizer.vocab_size
        )


def paths(pipe: DigitPipeline, seed: int = 0) -> dict[str, Way]:
    """The paths from an image through a model and back: by name, the VQGAN first.

    Raises:
        DigitError: the model has no VQGAN, and no decoder that does without.
    """
    found: dict[str, Way] = {}
    if pipe.vqgan is None:
        pipe.stage2().check_parts()
    else:
        found[VQGAN_ALONE] = Way.of(pipe, "vq", seed)
    if pipe.space == "semantic" and pipe.encoder is not None and pipe.codebook is not None:
        for kind in pipe.decoders:
            found[f"semantic tokens, {kind} decoder"] = Way.of(pipe, "semantic", seed, kind)
    return found


def perturbed_path(pipe: DigitPipeline, space: str, share: float, neighbours: int, seed: int = 0) -> Way:
    """A path of "vq" or "semantic" tokens, a ``share`` of which is replaced by one of the nearest codes.

    ``seed`` is that of the choice and of the decoder.
    """
    of = token_spaces(pipe)[space]
    return replace(
        Way.of(pipe, space, seed),
        encode=lambda x, numbers: perturb_tokens(
            of.features(x), of.codebook.centroids, share, neighbours, numbers, seed
        ),
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _pairs(
    pipe: DigitPipeline, dataset: ImageDataset, way: Way, batch_size: int, counts: Tensor | None = None
) -> Iterator[Pair]:
    """Originals and reconstructions; adds how often each code was used to ``counts`` (K,)."""
    for batch in image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8):
        images, numbers = to_tensor(batch.images.movedim(1, -1).numpy()).to(pipe.device), batch.indices.tolist()
        tokens = way.encode(images, numbers)
        if counts is not None:
            counts += torch.bincount(tokens.flatten().cpu(), minlength=way.codes)
        yield batch.images, way.decode(tokens, numbers)


def codebook_values(counts: Tensor) -> dict[str, float]:
    """``usage``, the share of codes that occur, and ``entropy`` in bits, from how often each of them does (K,)."""
    shares = counts.double() / counts.sum()
    return {
        "usage": float((counts > 0).double().mean()),
        "entropy": float(torch.special.entr(shares).sum() / math.log(2)),
    }


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
    """Measure every path of :func:`paths` with :func:`~digit.evaluation.metrics.reconstruction.reconstruction`.

    Args:
        perturb: also the FID under perturbation, of VQ tokens and, where there is a decoder, of semantic tokens.
        shares: of the tokens that are then replaced.
        neighbourhoods: from how many nearest codes, as shares of the codebook; at least 2 codes.
        seed: of the decoders and of the perturbation.

    Raises:
        DigitError: no VQGAN, too few images, or perturbation without the FID network.
    """
    began = time.monotonic()
    if perturb and extractor is None:
        raise DigitError(
            f"FID under perturbation needs the FID network: {(reasons or {}).get('rfid', 'none was given.')}"
        )
    ways, total, theirs = paths(pipe, seed), len(dataset), None
    if extractor is not None:
        batches = image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8)
        theirs = measure((batch.images for batch in batches), extractor, (), name="originals", total=total)

    def compared(name: str, way: Way) -> Reconstructed:
        counts = torch.zeros(way.codes, dtype=torch.long)
        pairs = _pairs(pipe, dataset, way, batch_size, counts)
        found = reconstruction(
            pairs, extractor=extractor, originals=theirs, lpips=lpips, reasons=reasons, total=total, name=name
        )
        return replace(found, values={**found.values, **codebook_values(counts)})

    def fid(space: str, share: float, neighbours: int) -> float:
        pairs = _pairs(pipe, dataset, perturbed_path(pipe, space, share, neighbours, seed), batch_size)
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
        seconds=time.monotonic() - began,
    )
