"""What the tasks that train on images share: their batches, passes over held-out images, and the making of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from digit.core.config import NonNegativeInt, config, to_dict
from digit.core.grids import image_grid
from digit.core.images import to_pil
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.sampling import Batches, OrderedSampler, StepSampler
from digit.training.losses.images import ImageLoss, ImageObjective
from digit.training.task import Batch, Groups, Stream, Task

_CHUNK = 250
_COLUMNS = 8  # of a sheet of samples
_SUBSET_SEED = 0
_DRAWS = 0x7669  # keeps these seeds apart from other uses of (seed, step)


@config
class ImageData:
    """Which images are learned from, and which measure: of the former a tenth at most;
    ``presets/bases/images.yaml``.
    """

    split: str = "train"
    held_out_split: str | None = "test"
    held_out: NonNegativeInt = 2000

    def open(self, data: str | Path) -> tuple[ImageDataset, ImageDataset | None]:
        """The images of a dataset to train on, and those that measure."""
        train = open_dataset(data, self.split)
        if self.held_out_split is not None:
            return train, some_images(open_dataset(data, self.held_out_split), self.held_out)
        count = min(self.held_out, len(train) // 10)
        if not count:
            return train, None
        order = np.random.default_rng(_SUBSET_SEED).permutation(len(train))
        return train.subset(np.sort(order[count:])), train.subset(np.sort(order[:count]))


def image_batches(
    images: ImageDataset, size: int, stream: Stream, draw: Callable[[int, torch.Generator], Batch]
) -> Iterator[Batch]:
    """Shuffled batches of "images" (B, 3, size, size) uint8, center-cropped, with random numbers, one row an example.
    ``draw`` makes them for the global batch, so they do not depend on how many processes there are.
    """
    sampler = StepSampler(len(images), stream.batch_size, stream.seed, stream.rank, stream.world)
    how: dict[str, Any] = {"start": stream.start, "stop": stream.stop, "workers": stream.workers}
    loader = Batches(images, sampler, Transform(size=size), seed=stream.seed, dtype=torch.uint8, **how)
    for step, batch in enumerate(loader, stream.start):
        words = np.random.SeedSequence([stream.seed, step, _DRAWS]).generate_state(1, np.uint64)
        drawn = draw(stream.batch_size, torch.Generator().manual_seed(int(words[0]) >> 1))
        own = {name: value[stream.rows] for name, value in drawn.items()}
        yield {"index": batch.indices, "images": batch.images, **own}


def image_chunks(images: ImageDataset, size: int, device: str) -> Iterator[Tensor]:
    """All of them in order, center-cropped, as (b, 3, size, size) in 0..1."""
    for batch in Batches(images, OrderedSampler(len(images), _CHUNK), Transform(size=size), workers=0):
        yield batch.images.to(device)


def some_images(images: ImageDataset, count: int) -> ImageDataset:
    """The same random ``count`` of them every time (folders come class by class); 0: all."""
    if not 0 < count < len(images):
        return images
    return images.subset(np.sort(np.random.default_rng(_SUBSET_SEED).permutation(len(images))[:count]))


def described(images: ImageDataset) -> dict[str, Any]:
    """The training images, for a run's description."""
    return {"name": images.name, "split": images.split, "fingerprint": images.fingerprint}


class ImageTask(Task):
    """A network that makes images of side ``resolution`` learns from images; ``frozen`` networks only serve."""

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        criterion: ImageLoss,
        resolution: int,
        train: ImageDataset,
        held_out: ImageDataset | None,
        description: Mapping[str, Any],
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self.modules, self.criterion = nn.ModuleDict(networks), criterion
        self.objective: ImageObjective = criterion.objective
        if criterion.discriminator is not None:
            self.modules["discriminator"] = criterion.discriminator
        self.frozen = [*frozen, *criterion.frozen]
        self.resolution, self.train, self.examples, self.held_out = resolution, train, len(train), held_out
        self.description = {**description, "objective": to_dict(self.objective)}

    def parameters_by_optimizer(self) -> Groups:
        """The generator, and the discriminator apart."""
        ours = [p for name, module in self.modules.items() if name != "discriminator" for p in module.parameters()]
        return {"model": [{"params": [p for p in ours if p.requires_grad]}], **self.criterion.optimizers()}

    def to_device(self, device: str) -> None:
        super().to_device(device)
        for network in self.frozen:
            network.to(device)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        return image_batches(self.train, self.resolution, stream, self.objective.draw)

    def examples_shown(self) -> tuple[ImageDataset, Tensor]:
        """The images of a sheet of samples, as a dataset and as (b, 3, S, S) in 0..1."""
        source = some_images(self.held_out or self.train, 2 * _COLUMNS)
        return source, next(image_chunks(source, self.resolution, self.device))


def flipped(batch: Batch) -> Tensor:
    """A batch's uint8 images (B, 3, S, S) in 0..1, those of them flipped for which "flip" (B,) is drawn."""
    images = batch["images"].float() / 255
    return torch.where(batch["flip"][:, None, None, None], images.flip(3), images)


def sheet(*rows: Tensor) -> Image.Image:
    """Images (b, 3, S, S) above their counterparts, a few in a row."""
    blocks = [row[start : start + _COLUMNS] for start in range(0, len(rows[0]), _COLUMNS) for row in rows]
    return image_grid([to_pil(image.cpu()) for block in blocks for image in block], columns=len(blocks[0]))


def errors(rebuilt: Tensor, images: Tensor) -> tuple[float, float]:
    """PSNR in dB and mean absolute error of images (b, 3, S, S), summed over them."""
    squared = (rebuilt - images).square().flatten(1).mean(1)  # (b,)
    psnr = -10 * squared.clamp(min=1e-10).log10()
    return float(psnr.sum()), float((rebuilt - images).abs().flatten(1).mean(1).sum())
