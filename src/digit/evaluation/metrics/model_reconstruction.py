"""How well a model gives back real images: through the VQGAN alone, and through semantic tokens and each decoder.

These are the ceilings of generation (last rows of the paper's tables 3 and 4): no prior can make images better than the
decoders give back real ones. Perturbed tokens show how forgiving they are: [0] RobusTok, arXiv 2509.12474, calls the
    FID under random
replacement of tokens by near ones pFID, the mean over shares and neighbourhoods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.images import to_tensor
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.features import FeatureSet, measure
from digit.evaluation.metrics.fidelity import FidelityOptions, compare
from digit.evaluation.metrics.inception import FeatureExtractor
from digit.evaluation.metrics.noise import perturb_tokens
from digit.evaluation.metrics.reconstruction import Pair, reconstruction
from digit.evaluation.metrics.stability import token_spaces
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size, pixels_of
from digit.evaluation.result import OTHER, OURS, Record, describe_model, figure
from digit.models.lpips import Lpips
from digit.pipeline.pipeline import DigitPipeline, Tokens

Numbers = Sequence[int]
Way = Callable[[Tensor, Numbers], Tensor]
"""Images (B, 3, S, S) in 0..1 and their numbers to reconstructions (B, 3, S, S) uint8."""

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
NEIGHBOURHOODS = (200 / 4096, 280 / 4096, 360 / 4096)
"""RobusTok's 200, 280 and 360 nearest codes as shares of the codebook; that its codebook has 4,096 entries is an
assumption."""
VQGAN_ALONE = "VQGAN alone"


def paths(pipe: DigitPipeline, seed: int = 0) -> dict[str, Way]:
    """The ways from an image through a model and back: by name, the VQGAN first.

    Raises:
        DigitError: the model has no VQGAN, and no decoder that does without.
    """
    found: dict[str, Way] = {}
    if pipe.vqgan is not None or not pipe.paints():
        vqgan = pipe.part("vqgan")
        found[VQGAN_ALONE] = lambda images, _: as_uint8(pipe.to_pixels(Tokens(None, vqgan.encode(images))))
    if pipe.space == "semantic" and pipe.encoder is not None and pipe.codebook is not None:
        for kind in pipe.decoders:
            found[f"semantic tokens, {kind} decoder"] = partial(_through, pipe, kind, seed)
    return found


def _through(pipe: DigitPipeline, kind: str, seed: int, images: Tensor, numbers: Numbers) -> Tensor:
    return pixels_of(pipe, pipe.tokenizer.encode(images), numbers, seed, kind)


def perturbed_path(pipe: DigitPipeline, space: str, share: float, neighbours: int, seed: int = 0) -> Way:
    """An image's tokens, a share of them replaced by one of the nearest codes, and back to pixels.

    Args:
        pipe: with a VQGAN, and for "semantic" a decoder, the default one.
        space: whose tokens: "vq" or "semantic".
        share: of the tokens.
        neighbours: codes to choose from.
        seed: of the choice and of the decoder.
    """
    tokens_of = token_spaces(pipe)[space]
    target = pipe if space == "semantic" else pipe.with_parts(space="vq", prior=None, decoders={})

    def path(images: Tensor, numbers: Numbers) -> Tensor:
        tokens = perturb_tokens(tokens_of.features(images), tokens_of.codes, share, neighbours, numbers, seed)
        return pixels_of(target, tokens, numbers, seed)

    return path


@torch.inference_mode()
def _both(pipe: DigitPipeline, dataset: ImageDataset, path: Way, batch_size: int) -> Iterator[Pair]:
    for batch in image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8):
        images = to_tensor(batch.images.movedim(1, -1).numpy()).to(pipe.device)  # (B, 3, S, S) in 0..1
        yield batch.images, path(images, batch.indices.tolist())


def _originals(pipe: DigitPipeline, dataset: ImageDataset, extractor: FeatureExtractor, batch_size: int) -> FeatureSet:
    batches = (batch.images for batch in image_batches(dataset, pipe_size(pipe), batch_size, torch.uint8))
    return measure(batches, extractor, name="originals", total=len(dataset))


def reconstruction_rows(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    extractor: FeatureExtractor | None,
    lpips: Lpips | None,
    reasons: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    originals: FeatureSet | None = None,
) -> list[dict[str, Any]]:
    """Measure every path of :func:`paths`; a record for each, with ``name`` and what
    :func:`~digit.evaluation.metrics.reconstruction.reconstruction` gives. ``originals`` None measures them, once.
    """
    rows, ways = [], paths(pipe, seed)
    if extractor is not None and originals is None:
        originals = _originals(pipe, dataset, extractor, batch_size)
    for name, path in ways.items():
        pairs = _both(pipe, dataset, path, batch_size)
        found = reconstruction(
            pairs, extractor=extractor, originals=originals, lpips=lpips, reasons=reasons, total=len(dataset), name=name
        )
        rows.append({"name": name, **found.to_dict()})
    return rows


def perturbation_rows(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    shares: Sequence[float] = SHARES,
    neighbourhoods: Sequence[float] = NEIGHBOURHOODS,
    seed: int = 0,
    batch_size: int = 64,
    originals: FeatureSet | None = None,
) -> list[dict[str, Any]]:
    """FID against the originals under latent perturbation, for VQ tokens and, where there is a decoder, semantic
    tokens.

    Args:
        pipe: the model.
        dataset: real images.
        extractor: the FID network.
        shares: of the tokens that are replaced.
        neighbourhoods: from how many nearest codes, as shares of the codebook; at least 2 codes.
        seed: of the choice and of the decoder.
        batch_size: images at a time.
        originals: the real images as that network sees them; None measures them.

    Returns:
        A record for each space: ``space``, ``pfid`` (mean), and ``points`` of share, neighbours, fid.
    """
    theirs = originals or _originals(pipe, dataset, extractor, batch_size)
    spaces = [space for space in token_spaces(pipe) if space == "vq" or (pipe.space == "semantic" and pipe.decoders)]
    rows = []
    for space in reversed(spaces):  # VQ first, as in the rows above
        codes = len(token_spaces(pipe)[space].codes)
        points = []
        for neighbours in dict.fromkeys(max(2, round(part * codes)) for part in neighbourhoods):
            for share in shares:
                path = perturbed_path(pipe, space, share, neighbours, seed)
                pictures = (pair[1] for pair in _both(pipe, dataset, path, batch_size))
                name = f"{space}, {share:.0%} of the tokens, {neighbours} codes"
                ours = measure(pictures, extractor, name=name, total=len(dataset))
                points.append(
                    {"share": share, "neighbours": neighbours, **compare(ours, theirs, FidelityOptions()).values}
                )
        rows.append(
            {"space": space, "codes": codes, "pfid": sum(p["fid"] for p in points) / len(points), "points": points}
        )
    return rows


def reconstruction_record(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    out: str | Path,
    extractor: FeatureExtractor | None,
    lpips: Lpips | None,
    reasons: Mapping[str, str] | None = None,
    perturb: bool = False,
    shares: Sequence[float] = SHARES,
    neighbourhoods: Sequence[float] = NEIGHBOURHOODS,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[Record, list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure, and write ``result.json``, and with ``perturb`` also ``perturbation.png``, into ``out``.

    Raises:
        DigitError: no VQGAN, too few images, or perturbation without the FID network.
    """
    out, began = Path(out), time.monotonic()
    if perturb and extractor is None:
        raise DigitError(
            f"The FID under perturbation needs the FID network: {(reasons or {}).get('rfid', 'none was given.')}"
        )
    paths(pipe, seed)  # refuses a model without any, before the originals take their time
    theirs = _originals(pipe, dataset, extractor, batch_size) if extractor else None
    rows = reconstruction_rows(pipe, dataset, extractor, lpips, reasons, seed, batch_size, theirs)
    perturbed = []
    if perturb and extractor is not None:
        perturbed = perturbation_rows(pipe, dataset, extractor, shares, neighbourhoods, seed, batch_size, theirs)
        _plot(perturbed, out / "perturbation.png")
    ceiling = {row.method: row.fid for row in paper.CEILING}
    record = Record(
        kind="reconstruction",
        title=f"Reconstruction of {len(dataset):,} images (last rows of tables 3 and 4)",
        values=rows,
        settings={"seed": seed, "batch_size": batch_size, "perturbation": perturbed},
        model=describe_model(pipe),
        data=describe_data(dataset),
        paper={"source": f"{paper.SOURCE}, tables 3 and 4: FID, ImageNet validation images", **ceiling},
        notes=list(dict.fromkeys(note for row in rows for note in row["notes"])),
        plots=["perturbation.png"] if perturbed else [],
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, rows, perturbed


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with figure(path, len(rows), (5.2, 4.0)) as panels:
        for panel, row in zip(panels, rows, strict=True):
            groups = list(dict.fromkeys(point["neighbours"] for point in row["points"]))
            for index, neighbours in enumerate(groups):
                mine = [point for point in row["points"] if point["neighbours"] == neighbours]
                panel.plot(
                    [100 * p["share"] for p in mine], [p["fid"] for p in mine], "o-",
                    color=OURS if row["space"] == "semantic" else OTHER, alpha=(index + 1) / len(groups),
                    label=f"{neighbours} nearest of {row['codes']:,}",
                )  # fmt: skip
            name = "semantic" if row["space"] == "semantic" else "VQ"
            panel.set(title=f"{name} tokens: pFID {row['pfid']:.2f}", xlabel="replaced tokens, %")
            panel.margins(y=0.12)
            panel.set(ylabel="FID against the originals (lower is better)")
            panel.legend(fontsize=9)
