"""Images for measurements: a data set in batches, and a sampling run whose pictures are measured and never written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.sampling.engine import check_request, sample

_LABELS_SHOWN = 100

# ---- data sets -------------------------------------------------------------------------------------------------------


def open_images(path: str | Path, split: str = "train", num: int | None = None) -> ImageDataset:
    """A data set, or ``num`` of its images at equal distances, for data sets are often sorted by class.

    Raises:
        DigitError: nothing there, or fewer than ``num`` images.
    """
    dataset = open_dataset(path, split)
    if num is None or num == len(dataset):
        return dataset
    if num > len(dataset):
        raise DigitError(f"{num:,} images were asked for; {dataset.name} {split} has {len(dataset):,}.")
    return dataset.subset(np.arange(num) * len(dataset) // num)


def image_batches(
    dataset: ImageDataset, size: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> Iterator[Batch]:
    """All images in order as (B, 3, size, size) in 0..1 (or uint8): shorter side scaled, middle cut out."""
    return iter(Batches(dataset, OrderedSampler(len(dataset), batch_size), Transform(size=size), dtype=dtype))


def describe_data(dataset: ImageDataset, path: str | Path | None = None) -> dict[str, Any]:
    """What a result says about its images."""
    return {
        "name": dataset.name,
        "path": None if path is None else str(path),
        "split": dataset.split,
        "images": len(dataset),
        "fingerprint": dataset.fingerprint,
    }


def encode_all(pipe: DigitPipeline, dataset: ImageDataset, batch_size: int) -> Tensor:
    """The tokens (n, N) that the prior of ``pipe`` would have to predict for real images."""
    batches = image_batches(dataset, pipe_size(pipe), batch_size)
    total = -(-len(dataset) // batch_size)
    return torch.cat([prior_tokens(pipe, b.images).cpu() for b in track(batches, "Tokenizing", total, "batches")])


@torch.inference_mode()
def prior_tokens(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) to tokens (B, N) of the space that the prior works in."""
    if pipe.space == "vq":
        return pipe.part("vqgan").encode(images.to(pipe.device))  # type: ignore[no-any-return]
    return pipe.tokenizer.encode(images)


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


# ---- sampling runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingRun:
    """A run of generation, defined by its settings alone.

    Attributes:
        pipe: the model.
        num: images.
        seed: of the run.
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

    @property
    def classes(self) -> Tensor | None:
        """(num,) the class of each image; None for an unconditional model."""
        labels = self.labels
        if labels is None and self.pipe.num_classes:
            labels = range(self.pipe.num_classes)
        return self.pipe.expand_labels(None if labels is None else list(labels), self.num)[1]

    def check(self) -> None:
        """Try the settings without sampling.

        Raises:
            DigitError: unknown settings or labels, guidance that the model cannot do, or a part that it lacks.
        """
        pipe = self.pipe
        prior = pipe.part("prior")
        pipe.check_pixels(self.decoder)
        chosen, later = pipe.settings_for("prior", self.settings, self.classes is not None)
        check_request(prior, chosen, self.classes)
        if pipe.space == "semantic":
            kind = pipe.pick_decoder(self.decoder)
            check_request(pipe.decoders[kind], pipe.settings_for(kind, later)[0], None)
        elif later or self.decoder:
            raise DigitError(
                f"The model '{pipe.name}' predicts VQ tokens itself; it has no decoder to choose or to set."
            )

    def stages(self) -> dict[str, Any]:
        """The settings of "prior" and "decoder" with every default filled in: runs that agree here are one."""
        prior, later = self.pipe.settings_for("prior", self.settings, self.classes is not None)
        stages = {"prior": to_dict(prior)}
        if self.pipe.space == "semantic":
            stages["decoder"] = to_dict(self.pipe.settings_for(self.pipe.pick_decoder(self.decoder), later)[0])
        return stages

    def identity(self) -> dict[str, Any]:
        """What the images depend on beside the model and :meth:`stages`."""
        return {
            "num": self.num,
            "seed": self.seed,
            "labels": None if self.labels is None else list(self.labels),
            "decoder": None if self.pipe.space == "vq" else self.pipe.pick_decoder(self.decoder),
        }

    def describe(self) -> dict[str, Any]:
        """What a result says about this run."""
        labels = self.labels
        shown = f"{len(labels):,}, one an image" if labels and len(labels) > _LABELS_SHOWN else labels and list(labels)
        named = "none" if self.classes is None else shown or "all in turns"
        return {**self.identity(), "labels": named, "settings": dict(self.settings), "batch_size": self.batch_size}

    def spans(self) -> Iterator[range]:
        """The numbers of the images of each batch."""
        for start in range(0, self.num, self.batch_size):
            yield range(start, min(start + self.batch_size, self.num))

    def prior(self, given: Tensor | None = None) -> Iterator[Tensor]:
        """Stage 1 batch by batch: tokens (B, N), continuing ``given`` (num, n) where there is any."""
        chosen, _ = self.pipe.settings_for("prior", self.settings, self.classes is not None)
        classes = self.classes
        for span in self.spans():
            part = slice(span.start, span.stop)
            labels = None if classes is None else classes[part]
            first = None if given is None else given[part]
            yield sample(self.pipe.part("prior"), span, self.seed, chosen, labels, given=first)

    def batches(self, tokens: Tensor | None = None) -> Iterator[Tensor]:
        """The images as (B, 3, S, S) uint8, from fresh tokens or from the prior's ``tokens`` (num, N)."""
        _, later = self.pipe.settings_for("prior", self.settings, self.classes is not None)
        firsts = self.prior() if tokens is None else (tokens[span.start : span.stop] for span in self.spans())
        for span, first in zip(self.spans(), firsts, strict=True):
            labels = None if self.classes is None else self.classes[span.start : span.stop]
            yield pixels_of(self.pipe, first, span, self.seed, self.decoder, later, labels)


def pixels_of(
    pipe: DigitPipeline,
    tokens: Tensor,
    images: Sequence[int],
    seed: int = 0,
    decoder: str | None = None,
    settings: Mapping[str, Any] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The prior's tokens (B, N) to images (B, 3, S, S) uint8; through the decoder unless they are VQ tokens already."""
    if pipe.space == "vq":
        return as_uint8(pipe.to_pixels(Tokens(None, tokens)))
    return as_uint8(pipe.to_pixels(pipe.complete(tokens, images, seed, decoder, labels, **(settings or {}))))


def as_uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0..1 to uint8 on the CPU, rounded as a saved PNG is."""
    return torch.from_numpy(to_uint8(images)).movedim(-1, -3).contiguous()
