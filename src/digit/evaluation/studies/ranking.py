"""Which tokens to train on, before anybody trains for days: a small prior is trained briefly on each, and probed.

Source: Xiong et al. 2025, arXiv 2504.08736 (GigaTok), whose AR probing finds that loss and probe accuracy of a small
model foretell those of large ones. They train 111M parameters for 50 epochs; here the size and the length are options,
and the ranking is only as good as they allow. Loss is given per image too: tokens of different number and vocabulary
cannot be compared by theirs.

``rank_tokens`` says what tokens keep of an image and what they cost, without training any network. Of each tokenizer:
use and entropy of its codes; how many tokens change under the paper's noise; 20 nearest neighbours on the mean code of
an image; and how well ridge regression, solved in closed form, gives back each patch of pixels from the code at its
place. They come together in bits saved per bit spent. Spent are the tokens, each at the entropy of its depth. Saved is
what a Gaussian code of the pixels of held-out images gets shorter by, when it knows the decoded patch in place of the
mean one: half the logarithm of the ratio of the mean squared errors, for each value. A decoder this weak compares
tokens by what lies open in them; a trained one reads more, and further than one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.clustering.discretisers import Discretisation, moments
from digit.clustering.streams import Points, Vectors
from digit.core.config import Positive, PositiveInt, config, to_dict
from digit.core.errors import DigitError
from digit.core.progress import track
from digit.data.dataset import ImageDataset
from digit.data.token_cache import Views
from digit.evaluation.metrics.noise import NoiseModel
from digit.evaluation.metrics.probe import ProbeOptions
from digit.evaluation.metrics.reconstruction import psnr
from digit.evaluation.metrics.stability import NOISE, stability, token_spaces
from digit.evaluation.model_source import as_uint8, describe_data, image_batches, pipe_size
from digit.evaluation.results import timed
from digit.evaluation.studies.stages import Comparison, Stages, predictability
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.tasks.encoder import neighbour_accuracy

RIDGE = 1e-3
"""Strength of the decoder's penalty, in mean squares of a code's values about their mean."""
NEIGHBOURS = 20
"""Of the k-NN classifier."""


@config
class RankingOptions:
    """The small prior and its short training.

    Attributes:
        steps, batch_size, lr: of the training; AdamW, cosine after a tenth of warm-up.
        dim, depth, heads: of the prior.
        probe: how its layers are probed.
        seed: of everything random.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 64
    lr: Positive = 1e-3
    dim: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    probe: ProbeOptions = ProbeOptions(epochs=30, lrs=(0.4, 4.0), standardize=True, neighbours=0)
    seed: int = 0

    def preset(self, space: str) -> dict[str, Any]:
        """The training preset of the small prior over "semantic" or "vq" tokens."""
        return {
            "component": "prior",
            "model": {"role": "prior", "transformer": {"dim": self.dim, "depth": self.depth, "heads": self.heads}},
            "data": {"target": space},
            "training": {
                "steps": self.steps, "batch_size": self.batch_size, "lr": self.lr, "schedule": "cosine",
                "warmup_steps": self.steps // 10, "seed": self.seed, "validate_every": 0,
            },
        }  # fmt: skip


def candidates(
    models: Mapping[str, DigitPipeline],
    clusters: Sequence[int],
    stages: Stages,
    kinds: Sequence[Discretisation] = (Discretisation(),),
) -> dict[str, DigitPipeline]:
    """The tokenizers of some models by name; one without encoder and codebook stands for its VQ tokens.

    ``clusters``: sizes K of codebooks to fit for each encoder, of each of ``kinds``; none keeps the models' own.

    Raises:
        DigitError: a model that makes no tokens, or codebooks were asked for and a model has no encoder.
    """
    found = {}
    for name, pipe in models.items():
        if clusters:
            encoder = pipe.part("encoder")
            for kind, count in product(kinds, clusters):
                codebook = stages.codebook(encoder, count, kind=kind).to(pipe.device)
                label = f"{name}, K = {codebook.config.clusters:,}" + (f", {kind}" if len(kinds) > 1 else "")
                found[label] = DigitPipeline(encoder=encoder, codebook=codebook, name=pipe.name)
        elif pipe.encoder is not None and pipe.codebook is not None:
            tokenizer = DigitPipeline(encoder=pipe.encoder, codebook=pipe.codebook, name=pipe.name)
            found[f"{name}, K = {pipe.codebook.config.clusters:,}"] = tokenizer
        elif pipe.vqgan is not None:
            tokenizer = DigitPipeline(vqgan=pipe.vqgan, space="vq", name=pipe.name)
            found[f"{name}, {pipe.vqgan.config.codes:,} VQ codes"] = tokenizer
        else:
            raise DigitError(f"The model '{name}' makes no tokens: it needs an encoder with a codebook, or a VQGAN.")
    return found


def _ranked(
    lines: list[dict[str, Any]], by: str, entries: Mapping[str, DigitPipeline], stages: Stages, **facts: Any
) -> Comparison:
    """The lines, the best first."""
    return Comparison(
        kind="screen",
        values=sorted(lines, key=lambda line: -line[by]),
        model={name: describe_model(pipe) for name, pipe in entries.items()},
        data={
            "train": describe_data(stages.train_images, *entries.values()),
            "test": describe_data(stages.test_images, *entries.values()),
        },
        **facts,
    )


@timed
def rank(entries: Mapping[str, DigitPipeline], stages: Stages, options: RankingOptions | None = None) -> Comparison:
    """Train a small prior on the tokens of each candidate and probe it; what is finished is not done again.

    A tenth of the training images, at most 512, is held out for the loss. All images need classes, for the probe.
    """
    options, lines = options or RankingOptions(), []
    for name, tokenizer in entries.items():
        preset = options.preset(tokenizer.space)
        prior, step = stages.token_model("prior", "of the ranking", preset, stages.tokens(tokenizer, Views()))
        known = predictability(float(step.value["metrics"]["nll"]), prior)
        probed = stages.probe(tokenizer.with_parts(prior=prior), step, options.probe)
        size = {"vocabulary": prior.config.vocab_size, "tokens": prior.config.length}
        lines.append({"name": name, **size, **known, **probed})
    notes = (
        f"A prior of {options.depth} blocks of width {options.dim} was trained for {options.steps} steps of "
        f"{options.batch_size} images; ranked by the probe of its middle layer (state {(options.depth + 1) // 2}).",
        "So short a training ranks what is learnt first. Differences of one or two points are within its noise.",
    )
    title = "Tokens ranked by a short training of a small prior"
    return _ranked(lines, "middle", entries, stages, title=title, settings=to_dict(options), notes=notes)


@timed
def rank_tokens(entries: Mapping[str, DigitPipeline], stages: Stages) -> Comparison:
    """Measure each candidate's tokens: learnt on the training images, measured on the test images. What is finished is
    not done again. Images without classes leave k-NN out.

    Raises:
        DigitError: images whose side the grid of tokens does not divide.
    """
    lines = []
    for name, pipe in entries.items():
        inputs = {
            **stages.tokenizer(pipe),
            "depth": pipe.codebook.config.depth if pipe.codebook is not None else 1,
            "images": [stages.train_images.fingerprint, stages.test_images.fingerprint],
        }
        step = stages.steps.run("measured", inputs, lambda _, pipe=pipe: measure(pipe, stages))  # type: ignore[misc]
        lines.append({"name": name, **step.value})
    notes = (
        f"Changed tokens: mean over the paper's levels of noise, {', '.join(f'{one.level:g}' for one in NOISE)} dB.",
        "Bits/image: tokens times the entropy of the codes, as they occur in the training images.",
        "PSNR and bits saved are those of a linear decoder that sees one place; ranks of other decoders may differ.",
        "Bits saved count values of pixels as if they were independent: they compare tokens, and are no rate of "
        "compression.",
    )
    settings = {"ridge": RIDGE, "neighbours": NEIGHBOURS, "noise": to_dict(NoiseModel())}
    title = "Tokens ranked without training"
    return _ranked(lines, "worth", entries, stages, title=title, settings=settings, notes=notes)


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
