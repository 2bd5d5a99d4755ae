"""What tokens keep of an image and what they cost, without training any network.

Of each tokenizer: use and entropy of its codes; how many tokens change under the paper's noise; 20 nearest neighbours
on the mean code of an image; and how well ridge regression, solved in closed form, gives back each patch of pixels from
the code at its place. They come together in bits saved per bit spent. Spent are the tokens, each at the entropy of its
depth. Saved is what a Gaussian code of the pixels of held-out images gets shorter by, when it knows the decoded patch
in place of the mean one: half the logarithm of the ratio of the mean squared errors, for each value.

A decoder this weak compares tokens by what lies open in them; a trained one reads more, and further than one place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.clustering.discretisers import moments
from digit.clustering.streams import Points, Vectors
from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.progress import track
from digit.data.dataset import ImageDataset
from digit.evaluation.metrics.noise import NoiseModel
from digit.evaluation.metrics.reconstruction import psnr
from digit.evaluation.metrics.stability import NOISE, stability, token_spaces
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size
from digit.evaluation.studies.ranking import Ranking
from digit.evaluation.studies.stages import Stages
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.tasks.encoder import neighbour_accuracy

RIDGE = 1e-3
"""Strength of the decoder's penalty, in mean squares of a code's values about their mean."""
NEIGHBOURS = 20
"""Of the k-NN classifier."""


def rank_tokens(entries: Mapping[str, DigitPipeline], stages: Stages) -> Ranking:
    """Measure each candidate's tokens: learnt on the training images, measured on the test images. What is finished is
    not done again. Images without classes leave k-NN out.

    Raises:
        DigitError: images whose side the grid of tokens does not divide.
    """
    began, lines = time.monotonic(), []
    for name, pipe in entries.items():
        shape = getattr(pipe.encoder, "config", None)
        inputs = {
            "weights": pipe.fingerprint(), "encoder": to_dict(shape) if shape is not None else None,
            "depth": pipe.codebook.config.depth if pipe.codebook is not None else 1,
            "images": [stages.train_images.fingerprint, stages.test_images.fingerprint],
        }  # fmt: skip
        step = stages.steps.run("measured", inputs, lambda _, pipe=pipe: measure(pipe, stages))  # type: ignore[misc]
        lines.append({"name": name, **step.value})
    lines.sort(key=lambda line: -line["worth"])
    return Ranking(
        title="Tokens ranked without training",
        values=lines,
        settings={"ridge": RIDGE, "neighbours": NEIGHBOURS, "noise": to_dict(NoiseModel())},
        model={name: describe_model(pipe) for name, pipe in entries.items()},
        data={
            "train": describe_data(stages.train_images, *entries.values()),
            "test": describe_data(stages.test_images, *entries.values()),
        },
        notes=(
            f"Changed tokens: mean over the paper's levels of noise, {', '.join(f'{one.level:g}' for one in NOISE)} "
            "dB.",
            "Bits/image: tokens times the entropy of the codes, as they occur in the training images.",
            "PSNR and bits saved are those of a linear decoder that sees one place; ranks of other decoders may "
            "differ.",
            "Bits saved count values of pixels as if they were independent: they compare tokens, and are no rate of "
            "compression.",
        ),
        seconds=time.monotonic() - began,
    )


@torch.inference_mode()
def measure(pipe: DigitPipeline, stages: Stages) -> dict[str, Any]:
    """A line of the ranking for one kind of tokens; with ``changed_by_level``, in dB."""
    ((space, of),) = token_spaces(pipe).items()
    grid = pipe.part("encoder").grid if space == "semantic" else pipe.part("vqgan").config.grid
    book, size, test = of.codebook, pipe_size(pipe), stages.test_images
    if size % grid[0] or size % grid[1]:
        raise DigitError(f"Images of {size} px cannot be cut into {grid[0]} x {grid[1]} patches, one a token.")
    counts, width, side = torch.zeros(book.tables.shape[:2], dtype=torch.float64), book.config.dim, size // grid[1]
    memory: list[tuple[Tensor, Tensor]] = []  # mean codes (B, D) and classes (B,)
    queries: list[tuple[Tensor, Tensor]] = []

    def tokenized(dataset: ImageDataset, pooled: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, ...]]:
        """Images (B, 3, S, S) in 0..1, their tokens, and their codes (B, N, D)."""
        batches, total = image_batches(dataset, size, stages.batch_size), -(-len(dataset) // stages.batch_size)
        for batch in track(batches, f"Tokens of {dataset.name} {dataset.split}", total, "batches"):
            images = batch.images.to(pipe.device)
            tokens = book.assign(of.features(images))
            codes = book.lookup(tokens)
            pooled.append((codes.mean(1).cpu(), batch.labels))
            yield images, tokens, codes

    def pairs(_number: int) -> Iterator[Points]:
        """The code at each place with its patch of pixels (n, D + P), while codes are counted."""
        for images, tokens, codes in tokenized(stages.train_images, memory):
            for depth, ids in enumerate(tokens.reshape(-1, len(counts)).T):
                counts[depth] += torch.bincount(ids.cpu(), minlength=counts.shape[1])
            patches = F.pixel_unshuffle(images, side).flatten(2).transpose(1, 2)  # (B, N, P)
            rows = torch.cat([codes, patches], 2).flatten(0, 1)
            yield Points(torch.arange(len(rows)), rows)

    mean, covariance = moments(Vectors(pairs, book.centroids.new_zeros(1, width + 3 * side * side)))
    own, shared = covariance[:width, :width], covariance[:width, width:]
    penalty = (RIDGE * own.trace() / width).clamp(min=1e-12) * torch.eye(width)
    weights = torch.linalg.solve(own + penalty, shared).to(book.centroids)  # (D, P)
    code, patch = mean.to(book.centroids).tensor_split([width])
    quality, errors = [], torch.zeros(2, dtype=torch.float64)
    for images, _, codes in tokenized(test, queries):
        decoded, constant = (
            F.pixel_shuffle(patches.transpose(1, 2).reshape(len(patches), -1, *grid), side)
            for patches in (patch + (codes - code) @ weights, patch.expand(1, codes.shape[1], -1))
        )
        quality.append(psnr(as_uint8(images), as_uint8(decoded.clamp(0, 1))))
        errors += torch.stack([(images - one).double().square().sum().cpu() for one in (decoded, constant)])
    entropies = torch.special.entr(counts / counts.sum(1, keepdim=True)).sum(1) / math.log(2)  # (d,)
    bits = grid[0] * grid[1] * float(entropies.sum())
    saved = 3 * size * size / 2 * math.log2(float(errors[1] / errors[0]))
    seen, classes, asked, truth = (torch.cat(v) for pooled in (memory, queries) for v in zip(*pooled, strict=True))
    classified = min(int(classes.min()), int(truth.min())) >= 0
    shaken = [row.changed.mean for row in stability(pipe, test, NOISE, batch_size=stages.batch_size).values]
    return {
        "vocabulary": counts.shape[1],
        "tokens": grid[0] * grid[1] * len(counts),
        "usage": float((counts > 0).double().mean()),
        "entropy": float(entropies.mean()),
        "bits_per_image": bits,
        "changed": sum(shaken) / len(shaken),
        "changed_by_level": {f"{change.level:g}": value for change, value in zip(NOISE, shaken, strict=True)},
        "knn": neighbour_accuracy(seen, classes, asked, truth, NEIGHBOURS) if classified else None,
        "psnr": float(torch.cat(quality).mean()),
        "worth": saved / bits if bits else 0.0,
    }
