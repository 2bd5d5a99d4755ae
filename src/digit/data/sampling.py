"""Which images a training step sees, as a pure function of the seed and the step.

Neither the number of processes, nor that of worker threads, nor where a run was interrupted changes it: the global
    batch of
step t is always the same set of images, each augmented in the same way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from digit.core.errors import DigitError
from digit.core.transforms import Transform, build_transform
from digit.data.dataset import ImageDataset

Positions = NDArray[np.int64]


class Sampler(Protocol):
    """Says which images belong to a step."""

    def indices(self, step: int) -> Positions:
        """The images of a step, as numbers in the dataset."""

    def epochs(self, step: int) -> Positions:
        """For each of them, how many times the dataset has been passed through before."""

    @property
    def steps(self) -> int | None:
        """Number of steps in one pass, for a sampler that makes only one; None for one that never ends."""


class StepSampler:
    """Shuffled batches without end: every epoch is one permutation of the dataset, and a batch may span two epochs.

    ``indices(step)`` depends on (length, batch_size, seed, step) alone. The ranks share the global batch in equal,
    disjoint parts, which concatenated by rank are the batch of a single process.

    Args:
        length: number of images.
        batch_size: global batch size, over all ranks; divisible by ``world_size``.
        seed: of the shuffling.
        rank: of this process.
        world_size: number of processes.
    """

    steps = None

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if length < 1 or batch_size < 1:
            raise DigitError(
                f"A sampler needs at least one image and a batch size of at least 1, not {length} and {batch_size}."
            )
        if batch_size % world_size or not 0 <= rank < world_size:
            raise DigitError(
                f"A batch of {batch_size} cannot be shared by {world_size} processes equally; choose a multiple."
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._share = batch_size // world_size
        self._first = rank * self._share
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def indices(self, step: int) -> Positions:
        """The images of this rank at ``step``: (batch_size / world_size,) int64."""
        epochs, places = np.divmod(self._positions(step), self.length)
        parts = [self._permutation(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate(parts)

    def epochs(self, step: int) -> Positions:
        """The epoch of each of ``indices(step)``, from 0."""
        return self._positions(step) // self.length

    def _positions(self, step: int) -> Positions:
        start = step * self.batch_size + self._first
        return np.arange(start, start + self._share, dtype=np.int64)

    def _permute(self, epoch: int) -> Positions:
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)


class OrderedSampler:
    """One pass in order; the last batch may be smaller. For everything that must see each image once."""

    def __init__(self, length: int, batch_size: int) -> None:
        if batch_size < 1:
            raise DigitError(f"The batch size must be at least 1, not {batch_size}.")
        self.length, self.batch_size = length, batch_size

    @property
    def steps(self) -> int:
        """Number of batches."""
        return -(-self.length // self.batch_size)

    def indices(self, step: int) -> Positions:
        """The images of batch ``step``: (batch_size,) int64, fewer in the last."""
        return np.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.length), dtype=np.int64)

    def epochs(self, step: int) -> Positions:
        """Zeros: there is one pass."""
        return np.zeros_like(self.indices(step))


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that augments image ``index`` in pass ``epoch``: streams of a counter-based generator (Philox4x64),
    one for each triple, so that it does not matter who draws when.

    Args:
        seed: of the run, 0 or more.
        epoch: the pass through the dataset, or the step; 0 or more.
        index: of the image, 0 or more.
    """
    # the lowest counter word is left to the draws themselves: 2^64 of them before two streams could meet
    return np.random.Generator(np.random.Philox(key=[seed, 0x617567], counter=[0, 0, epoch, index]))


class Batch(NamedTuple):
    """What :class:`Batches` yields."""

    images: torch.Tensor
    """(B, 3, H, W) float32 in 0..1, or uint8."""
    labels: torch.Tensor
    """(B,) int64, -1 for none."""
    indices: torch.Tensor
    """(B,) int64, numbers in the dataset."""


class Batches:
    """The batches of the steps ``start <= step < stop``, decoded and transformed by threads ahead of their use.

    The output is the same for any number of workers. Iterating again starts again at ``start``.

    Args:
        dataset: the images.
        sampler: which of them belong to a step.
        transform: what is done to each; its randomness comes from ``sample_rng(seed, epoch, index)``.
        seed: of the augmentation.
        start: first step.
        stop: one past the last step; by default the sampler's end, if it has one.
        workers: number of threads; 0 does the work in the caller's.
        prefetch: batches to keep ready, for each worker.
        dtype: torch.float32 (0..1) or torch.uint8.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: Sampler,
        transform: Transform,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.uint8):
            raise DigitError(f"Batches are float32 or uint8, not {dtype}.")
        self.dataset, self.sampler, self.transform, self.seed = dataset, sampler, transform, seed
        self.start, self.stop = start, sampler.steps if stop is None else stop
        self.workers, self.prefetch, self.dtype = workers, prefetch, dtype
        self._apply = build_transform(transform)

    def __iter__(self) -> Iterator[Batch]:
        if self.dataset.in_memory:
            self.dataset.arrays()  # once, here, and not first thing in every worker
        steps = iter(itertools.count(self.start) if self.stop is None else range(self.start, self.stop))
        if not self.workers:
            yield from map(self.batch, steps)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="digit-data")
        pending: deque[Future[Batch]] = deque()
        try:
            for step in itertools.islice(steps, self.workers * self.prefetch):
                pending.append(pool.submit(self.batch, step))
            while pending:
                batch = pending.popleft().result()
                for step in itertools.islice(steps, 1):
                    pending.append(pool.submit(self.batch, step))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of one step, made here and now.

        Raises:
            DigitError: an image cannot be read, or (with crop "none") has another size.
        """
        indices = self.sampler.indices(step)
        images = torch.from_numpy(self._pixels(step, indices)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        if self.dtype == torch.float32:
            images = images.float().div_(255)
        return Batch(images, torch.from_numpy(self.dataset.labels[indices]), torch.from_numpy(indices))

    def _pixels(self, step: int, indices: Positions) -> NDArray[np.uint8]:
        size = self.transform.size
        stored = self.dataset.arrays()[0] if self.dataset.in_memory else None  # (n, H, W, 3)
        as_stored = not self.transform.is_random and self.transform.resize in (None, size)
        if stored is not None and as_stored and self.dataset.image_size == (size, size):
            return stored[indices]
        pixels = np.empty((len(indices), size, size, 3), dtype=np.uint8)
        for row, (index, epoch) in enumerate(zip(indices.tolist(), self.sampler.epochs(step).tolist(), strict=True)):
            image = self.dataset[index].image if stored is None else Image.fromarray(stored[index])
            pixels[row] = np.asarray(self._apply(image, sample_rng(self.seed, epoch, index)))
        return pixels
