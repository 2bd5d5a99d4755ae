"""How many tokens change when pixels hardly do: the paper's Table 1, for semantic and VQ tokens, and under other
changes.

Of each image and each change four things are measured: the share of its tokens that change, the cosine between its
continuous features before and after, the cosine between the codes that the tokens stand for, and the same after the
mean code was taken from all. The paper's "cos-sim" may be either of the first two. They compare spaces badly: where all
vectors share a large common part, as a VQGAN's latents may, any two of them have a cosine near one; the last measure is
free of that. The paper publishes no protocol, so the choices (noise model, clipping, images) are part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.noise import Change, Kind, NoiseModel, apply_change, realised_snr
from digit.evaluation.model_source import describe_data, image_batches, pipe_size
from digit.evaluation.results import OTHER, OURS, Result, Rows, legend, panels, timed
from digit.models.codebook import Codebook
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline

NOISE = tuple(Change(kind="noise", level=snr) for snr in paper.SNRS)
OTHERS = (
    *(Change(kind="jpeg", level=quality) for quality in (90, 75, 50)),
    *(Change(kind="blur", level=sigma) for sigma in (0.5, 1.0)),
    Change(kind="shift", level=1),
    *(Change(kind="brightness", level=factor) for factor in (0.8, 1.2)),
)

MEASURES = {
    "changed": "Changed tokens ↓",
    "cosine_features": "Cosine of features ↑",
    "cosine_codes": "Cosine of codes ↑",
    "cosine_centred": "Cosine of centred codes ↑",
}
SPACES = {"semantic": "semantic tokens", "vq": "VQ tokens"}
_COLORS = {"semantic": OURS, "vq": OTHER}


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its 95% confidence interval (normal approximation: 1.96 standard errors)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value an image (n,), n >= 2."""
        mean, error = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
        return cls(mean, mean - error, mean + error)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ±{self.high - self.mean:.3f}"


@dataclass(frozen=True)
class Row:
    """One kind of tokens ("semantic" or "vq") under one change of the pixels; the measures stand at the top of this
    file.

    ``realised_snr`` is the mean over images of the SNR in dB after clipping; None where nothing changed.
    """

    space: str
    kind: Kind
    level: float
    realised_snr: float | None
    changed: Estimate
    cosine_features: Estimate
    cosine_codes: Estimate
    cosine_centred: Estimate

    @property
    def change(self) -> Change:
        """What was done to the pixels."""
        return Change(kind=self.kind, level=self.level)

    def paper_value(self, measure: str) -> float | None:
        """Table 1's value in the place of a measure, or None; every cosine stands beside the paper's one."""
        if self.kind != "noise" or self.level not in paper.SNRS:
            return None
        return paper.STABILITY[self.space][measure.partition("_")[0]][paper.SNRS.index(self.level)]


@dataclass(frozen=True, kw_only=True)
class Stability(Result):
    """A row for each kind of tokens and each change."""

    kind: str = "stability"
    values: tuple[Row, ...]

    def rows(self) -> Rows:
        return [
            {
                "Tokens": SPACES[row.space],
                "Change": str(row.change),
                **{title: str(getattr(row, measure)) for measure, title in MEASURES.items()},
                "Paper: changed": row.paper_value("changed"),
                "Paper: cosine": row.paper_value("cosine"),
            }
            for row in self.values
        ]

    def figure(self) -> Any:
        noise = sorted((r for r in self.values if r.kind == "noise" and math.isfinite(r.level)), key=lambda r: r.level)
        others = [row for row in self.values if row.kind != "noise"]
        figure, axes = panels(2 * bool(noise) + bool(others))
        spaces = list(dict.fromkeys(row.space for row in self.values))
        if noise:
            left, right = axes[:2]
            for space, (place, measure, style, label) in product(
                spaces,
                (
                    (left, "changed", "o-", ""),
                    (right, "cosine_features", "o-", ", features"),
                    (right, "cosine_codes", "s:", ", codes"),
                    (right, "cosine_centred", "^-.", ", centred codes"),
                ),
            ):
                color, mine = _COLORS[space], [(r.level, getattr(r, measure)) for r in noise if r.space == space]
                x, name = [level for level, _ in mine], SPACES[space] + label
                place.plot(x, [e.mean for _, e in mine], style, color=color, label=name, markersize=4)
                place.fill_between(x, [e.low for _, e in mine], [e.high for _, e in mine], color=color, alpha=0.2, lw=0)
            for space, (place, measure) in product(spaces, ((left, "changed"), (right, "cosine"))):
                values, name = paper.STABILITY[space][measure], f"{SPACES[space]}, paper (ImageNet)"
                place.plot(paper.SNRS, values, "x--", color=_COLORS[space], alpha=0.45, label=name, markersize=5)
            left.set(title="Tokens that change", ylabel="share of tokens (lower is more stable)", ylim=(0, 1))
            right.set(title="Cosine before and after", ylabel="cosine similarity (higher is more stable)")
            for place in (left, right):
                place.set(xlabel="signal-to-noise ratio of the pixels, dB")
                place.invert_xaxis()  # more noise to the right, as in the table
        if others:
            changes, height = list(dict.fromkeys(row.change for row in others)), 0.8 / len(spaces)
            for index, space in enumerate(spaces):
                shares = [row.changed for row in others if row.space == space]
                rows = [i + (index - (len(spaces) - 1) / 2) * height for i in range(len(changes))]
                how = {"xerr": [e.high - e.mean for e in shares], "ecolor": "#000000", "label": SPACES[space]}
                axes[-1].barh(rows, [e.mean for e in shares], height, color=_COLORS[space], **how)
            axes[-1].set_yticks(range(len(changes)), [str(change) for change in changes])
            axes[-1].invert_yaxis()
            axes[-1].set(xlabel="share of tokens (lower is more stable)", title="Other small changes", xlim=(0, None))
            axes[-1].grid(visible=False, axis="y")
        legend(axes)
        return figure


@dataclass(frozen=True)
class TokenSpace:
    """Features of images, and the codebook that makes them tokens: (B, N), or (B, N, d) of a residual one."""

    features: Callable[[Tensor], Tensor]  # images (B, 3, H, W) in 0..1 to (B, N, D)
    codebook: Codebook

    @cached_property
    def middle(self) -> Tensor:
        """The mean code (D,)."""
        return self.codebook.tables.mean(1).sum(0)

    def measure(self, clean: tuple[Tensor, Tensor], images: Tensor) -> Tensor:
        """The measures of each image, (B, 4), against the features and tokens of the clean images."""
        before, old = clean  # (B, N, D), (B, N)
        after = self.features(images)
        new = self.codebook.assign(after)
        was, now = self.codebook.lookup(old), self.codebook.lookup(new)  # (B, N, D)
        parts = (
            (new != old).float(),
            F.cosine_similarity(before.float(), after.float(), dim=-1),
            F.cosine_similarity(was, now, dim=-1),
            F.cosine_similarity(was - self.middle, now - self.middle, dim=-1),
        )
        return torch.stack([part.flatten(1).mean(1) for part in parts], 1).cpu()


def token_spaces(pipe: DigitPipeline) -> dict[str, TokenSpace]:
    """The kinds of tokens that a model can make.

    Raises:
        DigitError: none: it has neither encoder and codebook nor a VQGAN.
    """
    spaces = {}
    if pipe.encoder is not None and pipe.codebook is not None:
        spaces["semantic"] = TokenSpace(pipe.encoder, pipe.codebook)
    if pipe.vqgan is not None:
        spaces["vq"] = TokenSpace(pipe.vqgan.latents, Codebook.from_centroids(pipe.vqgan.codebook))
    if not spaces:
        raise DigitError(f"The model '{pipe.name}' makes no tokens: it needs an encoder and a codebook, or a VQGAN.")
    return spaces


@timed
@torch.inference_mode()
def stability(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    changes: Sequence[Change] = (*NOISE, *OTHERS),
    law: NoiseModel | None = None,
    batch_size: int = 64,
) -> Stability:
    """Measure the stability of a model's tokens, batch by batch.

    Encoder and codebook, or a VQGAN, or both are measured; :data:`NOISE` is what the paper does to the pixels.
    ``batch_size`` does not change the result beyond rounding.

    Raises:
        DigitError: fewer than two images, or a model without tokens.
    """
    law, spaces = law or NoiseModel(), token_spaces(pipe)
    if len(dataset) < 2:
        raise DigitError(f"{len(dataset)} image was given; a confidence interval needs at least 2.")
    values: dict[tuple[str, Change], list[Tensor]] = {(space, change): [] for space in spaces for change in changes}
    real: dict[Change, list[Tensor]] = {change: [] for change in changes}
    with bar("Stability", len(dataset)) as progress:
        for batch in image_batches(dataset, pipe_size(pipe), batch_size):
            images, numbers = batch.images.to(pipe.device), batch.indices.tolist()
            features = {name: space.features(images) for name, space in spaces.items()}
            clean = {name: (features[name], space.codebook.assign(features[name])) for name, space in spaces.items()}
            for change in changes:
                changed = apply_change(images, change, numbers, law)
                real[change].append(realised_snr(images, changed, law.signal).cpu())
                for name, space in spaces.items():
                    values[name, change].append(space.measure(clean[name], changed))
            progress.advance(len(images))
    rows = []
    for (name, change), found in values.items():
        snr = torch.cat(real[change])
        finite, measures = snr[snr.isfinite()], map(Estimate.of, torch.cat(found).double().T)
        rows.append(Row(name, change.kind, change.level, float(finite.mean()) if len(finite) else None, *measures))
    sizes = {name: len(space.codebook.centroids) for name, space in spaces.items()}
    return Stability(
        title="Stability of tokens under small changes of the pixels (Table 1)",
        values=tuple(rows),
        settings={"noise": to_dict(law), "snr_unit": "dB", "batch_size": batch_size, "codes": sizes},
        model=describe_model(pipe),
        data=describe_data(dataset, pipe),
        paper={"source": f"{paper.SOURCE}, Table 1", "snr": paper.SNRS, **paper.STABILITY},
        notes=_notes(law, sizes, len(dataset)),
    )


def _notes(law: NoiseModel, sizes: dict[str, int], count: int) -> tuple[str, ...]:
    what = "mean square" if law.signal == "power" else "variance"
    codes = ", ".join(f"{size:,} for {SPACES[name]}" for name, size in sizes.items())
    return (
        f"Noise: white Gaussian, SNR in dB against the {what} of each image's pixels in 0..1; "
        + ("clipped to 0..1 afterwards." if law.clip else "not clipped."),
        f"{count:,} images; intervals are 95% over images. Codes: {codes}; more codes change more readily.",
        "The paper gives neither its noise model nor its images, nor whether its cosine is of features or of codes.",
    )
