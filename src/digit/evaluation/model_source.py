"""Images for measurements: a data set in batches, and a sampling run whose images are measured and never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.config import to_dict
from digit.core.errors import DigitError
from digit.core.images import to_uint8
from digit.core.progress import track
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.sampling import Batch, Batches, OrderedSampler
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling.request import SampleRequest

_LABELS_SHOWN = 16


def open_images(path: str | Path, split: str = "train", num: int | None = None) -> ImageDataset:
    """A data set, or ``num`` of its images at equal distances, for data sets are often sorted by class.

    Raises:
        DigitError: nothing there, or fewer than ``num`` images.
    """
    dataset = open_dataset(path, split)
    if num is not None and num > len(dataset):
        raise DigitError(f"{num:,} images were asked for; {dataset.name} {split} has {len(dataset):,}.")
    return spread(dataset, num)


def spread(dataset: ImageDataset, num: int | None) -> ImageDataset:
    """At most ``num`` images, at equal distances."""
    return dataset if num is None or num >= len(dataset) else dataset.subset(np.arange(num) * len(dataset) // num)


def image_batches(
    dataset: ImageDataset, size: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """All images in order as (B, 3, size, size) in 0..1 (or uint8): shorter side scaled, middle cut out."""
    return iter(Batches(dataset, OrderedSampler(len(dataset), batch_size), Transform(size=size), dtype=dtype))


def describe_data(dataset: ImageDataset, *pipes: DigitPipeline, path: str | Path | None = None) -> dict[str, Any]:
    """What a result says about its images, as the models ``pipes`` saw them.

    Its ``filter`` names how they had been scaled when they were stored, and how for the models.
    """
    sizes = {(pipe_size(pipe),) * 2 for pipe in pipes}
    scaled = None
    if sizes != {dataset.image_size}:
        scaled = Transform.filter + ("" if sizes and dataset.image_size else " where of another size")
    return {
        "name": dataset.name,
        "path": None if path is None else str(path),
        "split": dataset.split,
        "images": len(dataset),
        "filter": ", then ".join(filter(None, (dataset.filter, scaled))) or "none",
        "fingerprint": dataset.fingerprint,
    }


def encode_all(pipe: DigitPipeline, dataset: ImageDataset, batch_size: int) -> Tensor:
    """The tokens (n, N) that the prior of ``pipe`` would have to predict for real images."""
    batches = image_batches(dataset, pipe_size(pipe), batch_size)
    total = -(-len(dataset) // batch_size)
    shown = track(batches, "Tokenizing", total, "batches")
    return torch.cat([pipe.prior_tokenizer.encode(batch.images).cpu() for batch in shown])


def pipe_size(pipe: DigitPipeline) -> int:
    """Side of the images that a model takes; encoder and VQGAN must agree.

    Raises:
        DigitError: they differ, or the model has neither.
    """
    sizes = {}
    if pipe.encoder is not None:
        sizes["encoder"] = pipe.encoder.preprocessing.image_size
    if pipe.vqgan is not None:
        sizes["VQGAN"] = pipe.vqgan.config.resolution
    if not sizes:
        raise DigitError(f"The model '{pipe.name}' has neither an encoder nor a VQGAN, so it takes no images.")
    if len(set(sizes.values())) > 1:
        raise DigitError(f"Encoder and VQGAN take images of different sizes ({sizes}); measure them as two models.")
    return int(next(iter(sizes.values())))


@dataclass(frozen=True)
class SamplingRun:
    """A run of generation, defined by its settings alone.

    Attributes:
        labels: classes that the images take in turns; None: all classes in turns where the model has classes.
        decoder: its kind; None takes the model's default.
        batch_size: images at a time; does not change them.
        settings: as for :meth:`DigitPipeline.__call__`.
    """

    pipe: DigitPipeline
    num: int
    seed: int = 0
    labels: Sequence[int] | None = None
    decoder: str | None = None
    batch_size: int = 64
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def request(self) -> SampleRequest:
        """What is asked for, checked."""
        labels = self.labels
        if labels is None and self.pipe.num_classes:
            labels = range(self.pipe.num_classes)
        request = SampleRequest.of_run(self.num, labels, self.seed, self.decoder, self.settings)
        return request.validate(self.pipe)

    def check(self) -> SamplingRun:
        """Itself, after the settings were tried without sampling."""
        _ = self.request
        return self

    def stages(self) -> dict[str, Any]:
        """The settings of "prior" and "decoder" with every default filled in: runs that agree here are one."""
        params = self.request.params
        stages = {"prior": to_dict(params["prior"])}
        if self.request.decoder is not None:
            stages["decoder"] = to_dict(params[self.request.decoder])
        return stages

    def identity(self) -> dict[str, Any]:
        """What the images depend on beside the model and :meth:`stages`."""
        return {
            "num": self.num,
            "seed": self.seed,
            "labels": None if self.labels is None else list(self.labels),
            "decoder": self.request.decoder,
        }

    def describe(self) -> dict[str, Any]:
        """What a result says about this run."""
        labels = self.labels
        shown = f"{len(labels):,}, one per image" if labels and len(labels) > _LABELS_SHOWN else labels and list(labels)
        named = "none" if self.request.labels is None else shown or "all in turns"
        how = {"settings": dict(self.settings), "stages": self.stages(), "batch_size": self.batch_size}
        return {**self.identity(), "labels": named, **how}

    def prior(self, given: Tensor | None = None) -> Iterator[Tensor]:
        """Stage 1 batch by batch: tokens (B, N), continuing ``given`` (num, n) where there is any."""
        for part in self.request.batches(self.batch_size):
            yield self.pipe.sample_prior(part, None if given is None else given[list(part.images)])

    def batches(self, tokens: Tensor | None = None) -> Iterator[Tensor]:
        """The images as (B, 3, S, S) uint8, from fresh tokens or from the prior's ``tokens`` (num, N)."""
        for part in self.request.batches(self.batch_size):
            first = self.pipe.sample_prior(part) if tokens is None else tokens[list(part.images)]
            yield as_uint8(self.pipe.to_pixels(self.pipe.complete(first, part)))


def as_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0..1 to uint8 on the CPU, rounded as a saved PNG is."""
    return torch.from_numpy(to_uint8(images)).movedim(-1, -3).contiguous()
