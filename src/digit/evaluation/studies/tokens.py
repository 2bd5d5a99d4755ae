"""What tokens keep of an image and what they cost, without training any network.

Of each tokenizer: use and entropy of its codes; how many tokens change under the paper's noise; 20 nearest neighbours on
the mean code of an image; and how well ridge regression, solved in closed form, gives back each patch of pixels from the
code at its place. They come together in bits saved per bit spent. Spent are the tokens, each at the entropy of its depth.
Saved is what a Gaussian code of the pixels of held-out images gets shorter by, when it knows the decoded patch in place of the
mean one: half the logarithm of the ratio of the mean squared errors, for each value.

A decoder this weak compares tokens by what lies open in them; a trained one reads more, and further than one place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.config import Positive, PositiveInt, config, to_dict
from digit.core.errors import DigitError
from digit.core.progress import track
from digit.data.dataset import ImageDataset
from digit.evaluation.metrics.noise import NoiseLaw
from digit.evaluation.metrics.reconstruction import psnr
from digit.evaluation.metrics.stability import NOISE, TokenSpace, stability, token_spaces
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size
from digit.evaluation.results import COLORS, Result, Rows, legend, panels
from digit.evaluation.studies.stages import Stages
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.neighbours import neighbour_accuracy

COLUMNS = {
    "codes": ("Codes", 1),
    "tokens": ("Tokens", 1),
    "usage": ("Used, %", 100),
    "entropy": ("Entropy, bits/token", 1),
    "bits": ("Bits/image", 1),
    "changed": ("Changed tokens, % ↓", 100),
    "knn": ("k-NN, % ↑", 100),
    "psnr": ("Ridge PSNR, dB ↑", 1),
    "worth": ("Bits saved per bit spent ↑", 1),
}
"""Headings and scales of the measured values."""


@config
class TokenOptions:
    """How tokens are measured.

    Attributes:
        ridge: strength of the decoder's penalty, in mean squares of a code's values about their mean.
        neighbours: of the k-NN classifier.
        noise: the law of the noise at the paper's levels.
    """

    ridge: Positive = 1e-3
    neighbours: PositiveInt = 20
    noise: NoiseLaw = NoiseLaw()


@dataclass(frozen=True, kw_only=True)
class TokenRanking(Result):
    """``values``: a line for each candidate, the one with most bits saved per bit spent first."""

    kind: str = "tokens"

    def rows(self) -> Rows:
        """A row for each candidate; changed tokens are the mean over the paper's levels of noise."""
        return [
            {
                "Rank": rank,
                "Candidate": line["name"],
                **{title: scale * line[key] for key, (title, scale) in COLUMNS.items() if line[key] is not None},
            }
            for rank, line in enumerate(self.values, 1)
        ]

    def figure(self) -> Any:
        """PSNR over bits, and k-NN over changed tokens."""
        figure, axes = panels(2, (5.4, 4.0))
        for index, line in enumerate(self.values):
            mark = "os^DvP"[index // (len(COLORS) - 1) % 6]
            style = {"color": COLORS[1 + index % (len(COLORS) - 1)], "label": line["name"]}
            axes[0].plot([line["bits"]], [line["psnr"]], mark, **style)
            if line["knn"] is not None:
                axes[1].plot([100 * line["changed"]], [100 * line["knn"]], mark, **style)
        axes[0].set(xlabel="bits an image", ylabel="PSNR of the ridge decoder, dB", title="What the bits buy")
        axes[1].set(
            xlabel="tokens that change under noise, %", ylabel="k-NN on mean codes, %", title="Meaning and stability"
        )
        legend(axes[:1])
        return figure


def rank_tokens(
    entries: Mapping[str, DigitPipeline], stages: Stages, options: TokenOptions | None = None
) -> TokenRanking:
    """Measure each candidate's tokens: learnt on the training images, measured on the test images. What is finished is
    not done again. Images without classes leave k-NN out.

    Raises:
        DigitError: images whose side the grid of tokens does not divide.
    """
    options, began = options or TokenOptions(), time.monotonic()
    lines = []
    for name, pipe in entries.items():
        shape = getattr(pipe.encoder, "config", None)
        inputs = {
            "weights": pipe.fingerprint(), "options": to_dict(options),
            "encoder": to_dict(shape) if shape is not None else None,
            "depth": pipe.codebook.config.depth if pipe.codebook is not None else 1,
            "images": [stages.train_images.fingerprint, stages.test_images.fingerprint],
        }  # fmt: skip
        step = stages.steps.run("measured", inputs, lambda _, pipe=pipe: measure(pipe, stages, options))  # type: ignore[misc]
        lines.append({"name": name, **step.value})
    lines.sort(key=lambda line: -line["worth"])
    return TokenRanking(
        title="Tokens ranked without training",
        values=lines,
        settings=to_dict(options),
        model={name: describe_model(pipe) for name, pipe in entries.items()},
        data={"train": describe_data(stages.train_images), "test": describe_data(stages.test_images)},
        notes=(
            f"Changed tokens: mean over the paper's levels of noise, {', '.join(f'{one.level:g}' for one in NOISE)} dB.",
            "Bits/image: tokens times the entropy of the codes, as they occur in the training images.",
            "PSNR and bits saved are those of a linear decoder that sees one place; ranks of other decoders may differ.",
        ),
        seconds=time.monotonic() - began,
    )


@torch.inference_mode()
def measure(pipe: DigitPipeline, stages: Stages, options: TokenOptions) -> dict[str, Any]:
    """The values of :data:`COLUMNS` for one kind of tokens; ``changed_by_level`` beside them."""
    ((space, of),) = token_spaces(pipe).items()
    grid = pipe.part("encoder").grid if space == "semantic" else pipe.part("vqgan").config.grid
    decoder = _Ridge(grid, options.ridge)
    memory, labels, counts = [], [], torch.zeros(of.codebook.tables.shape[:2], dtype=torch.float64)
    for images, tokens, classes in _tokenized(pipe, of, stages.train_images, stages.batch_size):
        codes = of.codebook.lookup(tokens)  # (B, N, D)
        decoder.add(codes, images)
        memory.append(codes.mean(1).cpu())
        labels.append(classes)
        for depth, ids in enumerate(tokens.reshape(-1, len(counts)).T):
            counts[depth] += torch.bincount(ids.cpu(), minlength=counts.shape[1])
    decoder.solve()
    queries, answers, quality, errors, values = [], [], [], torch.zeros(2, dtype=torch.float64), 0
    for images, tokens, classes in _tokenized(pipe, of, stages.test_images, stages.batch_size):
        codes = of.codebook.lookup(tokens)
        found = decoder(codes)
        quality.append(psnr(as_uint8(images), as_uint8(found.clamp(0, 1))))
        errors += torch.stack([(images - side).double().square().sum().cpu() for side in (found, decoder.middle)])
        values += images[0].numel() * len(images)
        queries.append(codes.mean(1).cpu())
        answers.append(classes)
    entropies = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1) / math.log(2)  # (d,)
    places, test = grid[0] * grid[1], stages.test_images
    bits = places * float(entropies.sum())
    saved = values / len(test) / 2 * math.log2(float(errors[1] / errors[0]))
    seen, asked = (torch.cat(memory), torch.cat(labels)), (torch.cat(queries), torch.cat(answers))
    classified = min(int(seen[1].min()), int(asked[1].min())) >= 0
    shaken = [row.changed.mean for row in stability(pipe, test, NOISE, options.noise, stages.batch_size).values]
    return {
        "codes": counts.shape[1],
        "tokens": places * len(counts),
        "usage": float((counts > 0).double().mean()),
        "entropy": float(entropies.mean()),
        "bits": bits,
        "changed": sum(shaken) / len(shaken),
        "changed_by_level": {f"{change.level:g}": value for change, value in zip(NOISE, shaken, strict=True)},
        "knn": neighbour_accuracy(*seen, *asked, options.neighbours) if classified else None,
        "psnr": float(torch.cat(quality).mean()),
        "worth": saved / bits if bits else 0.0,
    }


def _tokenized(
    pipe: DigitPipeline, of: TokenSpace, dataset: ImageDataset, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B, 3, S, S) in 0..1, their tokens and their classes."""
    total = -(-len(dataset) // batch_size)
    batches = image_batches(dataset, pipe_size(pipe), batch_size)
    for batch in track(batches, f"Tokens of {dataset.name} {dataset.split}", total, "batches"):
        images = batch.images.to(pipe.device)
        yield images, of.codebook.assign(of.features(images)), batch.labels


class _Ridge:
    """Ridge regression from the code at a place to its patch of pixels, one for all places.

    Attributes:
        middle: (3, S, S) the mean patch at every place; what it gives without any code.
    """

    def __init__(self, grid: tuple[int, int], penalty: float) -> None:
        self._grid, self._penalty, self._count = grid, penalty, 0
        self._offset = self._sums = self._weights = self.middle = torch.zeros(())

    def add(self, codes: Tensor, images: Tensor) -> None:
        """Learn from codes (B, N, D) and images (B, 3, S, S)."""
        if not self._count:
            self._offset = codes.mean((0, 1))  # near the mean, so that squares do not swamp the variance
        x, y = (codes - self._offset).flatten(0, 1), self._patches(images).flatten(0, 1)
        rows = torch.cat([x, y, torch.ones_like(x[:, :1])], 1)
        self._sums = self._sums + (rows.T @ rows).double().cpu()
        self._count, self._width = self._count + len(x), x.shape[1]

    def solve(self) -> None:
        """Find the weights; nothing is added afterwards."""
        means = self._sums[-1, :-1] / self._count
        covariance = self._sums[:-1, :-1] / self._count - torch.outer(means, means)
        own, shared = covariance[: self._width, : self._width], covariance[: self._width, self._width :]
        penalty = (self._penalty * own.trace() / self._width).clamp(min=1e-12)
        self._weights = torch.linalg.solve(own + penalty * torch.eye(self._width), shared).to(self._offset)  # (D, P)
        means = means.to(self._offset)
        self._offset, self._patch = self._offset + means[: self._width], means[self._width :]
        self.middle = self._images(self._patch.expand(1, self._grid[0] * self._grid[1], -1))[0]

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes (B, N, D) to images (B, 3, S, S)."""
        return self._images(self._patch + (codes - self._offset) @ self._weights)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, N, P)"""
        rows, columns = self._grid
        if images.shape[-2] % rows or images.shape[-1] % columns:
            raise DigitError(
                f"Images of {images.shape[-1]} px cannot be cut into {rows} x {columns} patches, one a token."
            )
        return F.pixel_unshuffle(images, images.shape[-1] // columns).flatten(2).transpose(1, 2)

    def _images(self, patches: Tensor) -> Tensor:
        """(B, N, P) to (B, 3, S, S)"""
        planes = patches.transpose(1, 2).reshape(len(patches), -1, *self._grid)  # (B, P, rows, columns)
        return F.pixel_shuffle(planes, math.isqrt(planes.shape[1] // 3))
