"""How much tokens move when pixels hardly do: the paper's Table 1, for semantic and VQ tokens, and the same under other
changes.

Of each image and each change of its pixels four things are measured: the share of its tokens that change, the cosine
    between its
continuous features before and after, the cosine between the codes that the tokens stand for, and the same after the
mean code was taken from all. The paper's "cos-sim" may be either of the first two. They compare spaces badly: where all
vectors share a large common part, as a VQGAN's latents may, any two of them have a cosine near one; the last measure is
free of that. The paper publishes no protocol, so the choices (noise law, clipping, images) are part of the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.noise import Change, NoiseLaw, apply_change, realised_snr
from digit.evaluation.model_source import describe_data, image_batches, pipe_size
from digit.evaluation.result import OTHER, OURS, Record, describe_model, figure
from digit.models.codebook import nearest
from digit.pipeline.pipeline import DigitPipeline

NOISE = tuple(Change(kind="noise", level=snr) for snr in paper.SNRS)
OTHERS = (
    *(Change(kind="jpeg", level=quality) for quality in (90, 75, 50)),
    *(Change(kind="blur", level=sigma) for sigma in (0.5, 1.0)),
    Change(kind="shift", level=1),
    *(Change(kind="brightness", level=factor) for factor in (0.8, 1.2)),
)

MEASURES = ("changed", "cosine_features", "cosine_codes", "cosine_centred")
_NAMES = {"semantic": "semantic tokens", "vq": "VQ tokens"}
_COLORS = {"semantic": OURS, "vq": OTHER}


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95% confidence interval (normal approximation: 1.96 standard errors)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """From one value an image (n,), n >= 2."""
        mean, error = float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
        return cls(mean, mean - error, mean + error)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ±{self.high - self.mean:.3f}"


@dataclass(frozen=True)
class Row:
    """One kind of tokens under one change.

    Attributes:
        space: "semantic" or "vq".
        change: of the pixels.
        changed: share of the tokens that change.
        cosine_features: between continuous features before and after.
        cosine_codes: between the codes assigned before and after.
        cosine_centred: the same, of codes less the mean of all codes.
        realised_snr: mean over images of the SNR in dB that the pixels really have, after clipping; None where nothing
            changed.
    """

    space: str
    change: Change
    changed: Estimate
    cosine_features: Estimate
    cosine_codes: Estimate
    cosine_centred: Estimate
    realised_snr: float | None


@dataclass(frozen=True)
class _Space:
    """Features of images, and the codes that make them tokens."""

    features: Callable[[Tensor], Tensor]
    assign: Callable[[Tensor], Tensor]
    codes: Tensor

    @cached_property
    def centred(self) -> Tensor:
        """The codes less their mean."""
        return self.codes - self.codes.mean(0)

    def measure(self, clean: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
        """The measures of each image, (B, 4), against the features and tokens of the clean images."""
        before, old = clean  # (B, N, D), (B, N)
        after = self.features(images)
        new = self.assign(after)
        parts = (
            (new != old).float(),
            F.cosine_similarity(before.float(), after.float(), dim=-1),
            F.cosine_similarity(self.codes[old], self.codes[new], dim=-1),
            F.cosine_similarity(self.centred[old], self.centred[new], dim=-1),
        )
        return torch.stack([part.mean(1) for part in parts], 1).cpu()


def token_spaces(pipe: DigitPipeline) -> dict[str, _Space]:
    """The kinds of tokens that a model can make.

    Raises:
        DigitError: none: it has neither encoder and codebook nor a VQGAN.
    """
    spaces = {}
    if pipe.encoder is not None and pipe.codebook is not None:
        tokenizer, codebook = pipe.tokenizer, pipe.codebook
        spaces["semantic"] = _Space(tokenizer.features, codebook.assign, codebook.centroids)
    if pipe.vqgan is not None:
        codes = pipe.vqgan.codebook
        spaces["vq"] = _Space(pipe.vqgan.latents, lambda latents: nearest(latents, codes), codes)
    if not spaces:
        raise DigitError(f"The model '{pipe.name}' makes no tokens: it needs an encoder and a codebook, or a VQGAN.")
    return spaces


@torch.inference_mode()
def stability(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    changes: Sequence[Change] = NOISE,
    law: NoiseLaw | None = None,
    batch_size: int = 64,
) -> list[Row]:
    """Measure the stability of a model's tokens.

    Images pass in batches; what is kept is a few numbers an image.

    Args:
        pipe: with encoder and codebook, or a VQGAN, or both; nothing else of it is used.
        dataset: at least two images.
        changes: what is done to the pixels; :data:`NOISE` is the paper's.
        law: how noise is made.
        batch_size: images at a time; does not change the result beyond rounding.

    Returns:
        A row for each kind of tokens and each change.

    Raises:
        DigitError: fewer than two images, or a model without tokens.
    """
    law = law or NoiseLaw()
    spaces = token_spaces(pipe)
    if len(dataset) < 2:
        raise DigitError(f"{len(dataset)} image was given; a confidence interval needs at least 2.")
    values: dict[tuple[str, Change], list[Tensor]] = {(space, change): [] for space in spaces for change in changes}
    real: dict[Change, list[Tensor]] = {change: [] for change in changes}
    with bar("Stability", len(dataset)) as progress:
        for batch in image_batches(dataset, pipe_size(pipe), batch_size):
            images, numbers = batch.images.to(pipe.device), batch.indices.tolist()
            features = {name: space.features(images) for name, space in spaces.items()}
            clean = {name: (features[name], space.assign(features[name])) for name, space in spaces.items()}
            for change in changes:
                changed = apply_change(images, change, numbers, law)
                real[change].append(realised_snr(images, changed, law.signal).cpu())
                for name, space in spaces.items():
                    values[name, change].append(space.measure(clean[name], changed))
            progress.advance(len(images))
    return [_row(name, change, torch.cat(rows), torch.cat(real[change])) for (name, change), rows in values.items()]


def _row(space: str, change: Change, values: Tensor, real: Tensor) -> Row:
    finite = real[torch.isfinite(real)]
    changed, features, codes, centred = (Estimate.of(column) for column in values.double().numpy().T)
    return Row(space, change, changed, features, codes, centred, float(finite.mean()) if len(finite) else None)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def stability_record(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    out: str | Path,
    changes: Sequence[Change] = (*NOISE, *OTHERS),
    law: NoiseLaw | None = None,
    batch_size: int = 64,
) -> tuple[Record, list[Row]]:
    """Measure, and write ``result.json``, ``stability.png`` and, for changes other than noise, ``changes.png`` into
    ``out``.
    """
    law, began = law or NoiseLaw(), time.monotonic()
    rows = stability(pipe, dataset, changes, law, batch_size)
    plots = _plot(rows, Path(out))
    sizes = {name: len(space.codes) for name, space in token_spaces(pipe).items()}
    record = Record(
        kind="stability",
        title="Stability of tokens under small changes of the pixels (Table 1)",
        values=[_plain(row) for row in rows],
        settings={"noise": to_dict(law), "snr_unit": "dB", "batch_size": batch_size, "codes": sizes},
        model=describe_model(pipe),
        data=describe_data(dataset),
        paper={"source": f"{paper.SOURCE}, Table 1", "snr": paper.SNRS, **paper.STABILITY},
        notes=_notes(law, sizes, len(dataset)),
        plots=plots,
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, rows


def _notes(law: NoiseLaw, sizes: dict[str, int], count: int) -> list[str]:
    what = "mean square" if law.signal == "power" else "variance"
    codes = ", ".join(f"{size:,} for {_NAMES[name]}" for name, size in sizes.items())
    return [
        f"Noise: white Gaussian, SNR in dB against the {what} of each image's pixels in 0..1; "
        + ("clipped to 0..1 afterwards." if law.clip else "not clipped."),
        f"{count:,} images; intervals are 95% over images. Codes: {codes}; more codes change more readily.",
        "The paper gives neither its noise law nor its images, nor whether its cosine is of features or of codes.",
    ]


def _plain(row: Row) -> dict[str, Any]:
    plain = {"space": row.space, "kind": row.change.kind, "level": row.change.level, "realised_snr": row.realised_snr}
    return plain | {name: vars(getattr(row, name)) for name in MEASURES}


def paper_value(row: Row, measure: str) -> float | None:
    """What Table 1 has in the place of a measure of a row; both cosines stand beside its one."""
    if row.change.kind != "noise" or row.change.level not in paper.SNRS:
        return None
    return paper.STABILITY[row.space][measure.partition("_")[0]][paper.SNRS.index(row.change.level)]


def _plot(rows: Sequence[Row], out: Path) -> list[str]:
    noise = [row for row in rows if row.change.kind == "noise" and math.isfinite(row.change.level)]
    others = [row for row in rows if row.change.kind != "noise"]
    plots = []
    if noise:
        _plot_noise(noise, out / "stability.png")
        plots.append("stability.png")
    if others:
        _plot_others(others, out / "changes.png")
        plots.append("changes.png")
    return plots


def _plot_noise(rows: Sequence[Row], path: Path) -> None:
    with figure(path, 2) as (left, right):
        for space in dict.fromkeys(row.space for row in rows):
            mine = sorted((row for row in rows if row.space == space), key=lambda row: row.change.level)
            x, color, name = [row.change.level for row in mine], _COLORS[space], _NAMES[space]
            for axes, measure, style, label in (
                (left, "changed", "o-", name),
                (right, "cosine_features", "o-", f"{name}, features"),
                (right, "cosine_codes", "s:", f"{name}, codes"),
                (right, "cosine_centred", "^-.", f"{name}, centred codes"),
            ):
                estimates = [getattr(row, measure) for row in mine]
                axes.plot(x, [e.mean for e in estimates], style, color=color, label=label, markersize=4)
                axes.fill_between(
                    x, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.2, lw=0
                )
            for axes, key in ((left, "changed"), (right, "cosine")):
                shade = {"color": color, "alpha": 0.45, "marker": "x", "markersize": 5}
                axes.plot(paper.SNRS, paper.STABILITY[space][key], "--", **shade, label=f"{name}, paper (ImageNet)")
        left.set(title="Tokens that change", ylabel="share of tokens (lower is more stable)", ylim=(0, 1))
        right.set(title="Cosine before and after", ylabel="cosine similarity (higher is more stable)")
        for axes in (left, right):
            axes.set(xlabel="signal-to-noise ratio of the pixels, dB")
            axes.invert_xaxis()  # more noise to the right, as in the table
            axes.legend(fontsize=8)


def _plot_others(rows: Sequence[Row], path: Path) -> None:
    changes = list(dict.fromkeys(row.change for row in rows))
    spaces = list(dict.fromkeys(row.space for row in rows))
    with figure(path, 1, (8.0, 0.5 * len(changes) + 1.6)) as (axes,):
        for index, space in enumerate(spaces):
            mine = {row.change: row.changed for row in rows if row.space == space}
            height = 0.8 / len(spaces)
            places = [i + (index - (len(spaces) - 1) / 2) * height for i in range(len(changes))]
            errors = [mine[change].high - mine[change].mean for change in changes]
            axes.barh(
                places,
                [mine[c].mean for c in changes],
                height,
                xerr=errors,
                color=_COLORS[space],
                ecolor="black",
                label=_NAMES[space],
            )
        axes.set_yticks(range(len(changes)), [str(change) for change in changes])
        axes.invert_yaxis()
        axes.set(
            xlabel="share of tokens that change (lower is more stable)", title="Other small changes", xlim=(0, None)
        )
        axes.grid(visible=False, axis="y")
        axes.legend(fontsize=9)
