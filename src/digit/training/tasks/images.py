"""What the tasks that train on images share: their batches, and passes over held-out images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.sampling import Batches, OrderedSampler, StepSampler
from digit.training.task import Batch, Stream

_CHUNK = 250
_SUBSET_SEED = 0
_DRAWS = 0x7669  # keeps these seeds apart from other uses of (seed, step)


def open_images(
    data: str | Path, split: str, held_out_split: str | None, held_out: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """The images to train on, and ``held_out`` that measure (0: all there are).

    They come from another split, or, where ``held_out_split`` is None, are kept back from the training images: at most
        a tenth.
    """
    train = open_dataset(data, split)
    if held_out_split is not None:
        return train, some_images(open_dataset(data, held_out_split), held_out)
    count = min(held_out, len(train) // 10)
    if not count:
        return train, None
    order = np.random.default_rng(_SUBSET_SEED).permutation(len(train))
    return train.subset(np.sort(order[count:])), train.subset(np.sort(order[:count]))


def image_batches(
    images: ImageDataset, size: int, stream: Stream, draw: Callable[[int, torch.Generator], Batch]
) -> Iterator[Batch]:
    """Shuffled batches of "images" (B, 3, size, size) uint8, center-cropped, with the random numbers of each example.

    Args:
        images: to train on.
        size: side of the images.
        stream: which batches.
        draw: (examples, generator) -> named tensors of one row an example. It is called for the global batch and cut
            afterwards, so the numbers do not depend on how many processes there are.
    """
    sampler = StepSampler(len(images), stream.batch_size, stream.seed, stream.rank, stream.world)
    loader = Batches(
        images,
        sampler,
        Transform(size=size),
        seed=stream.seed,
        start=stream.start,
        stop=stream.stop,
        workers=stream.workers,
        dtype=torch.uint8,
    )
    for step, batch in enumerate(loader, stream.start):
        words = np.random.SeedSequence([stream.seed, step, _DRAWS]).generate_state(1, np.uint64)
        drawn = draw(stream.batch_size, torch.Generator().manual_seed(int(words[0]) >> 1))
        yield {
            "index": batch.indices,
            "images": batch.images,
            **{name: value[stream.rows] for name, value in drawn.items()},
        }


def image_chunks(images: ImageDataset, size: int, device: str) -> Iterator[Tensor]:
    """All of them in order, center-cropped, as (b, 3, size, size) in 0..1."""
    for batch in Batches(images, OrderedSampler(len(images), _CHUNK), Transform(size=size), workers=0):
        yield batch.images.to(device)


def some_images(images: ImageDataset, count: int) -> ImageDataset:
    """The same random ``count`` of them every time (folders come class by class, so the first ones would not do); 0:
    all.
    """
    if not 0 < count < len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(_SUBSET_SEED).permutation(len(images))[:count]))


def mirrored(batch: Batch) -> Tensor:
    """A batch's uint8 images (B, 3, S, S) in 0..1, those of them mirrored for which "flip" (B,) is drawn."""
    images = batch["images"].float() / 255
    return torch.where(batch["flip"][:, None, None, None], images.flip(3), images)


def errors(rebuilt: Tensor, images: Tensor) -> tuple[float, float]:
    """PSNR in dB and mean absolute error of images (b, 3, S, S), summed over them."""
    squared = (rebuilt - images).square().flatten(1).mean(1)  # (b,)
    psnr = -10 * squared.clamp(min=1e-10).log10()
    return float(psnr.sum()), float((rebuilt - images).abs().flatten(1).mean(1).sum())
