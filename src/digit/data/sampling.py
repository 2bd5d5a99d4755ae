"""Which images a training step sees, as a pure function of the seed and the step.

Neither the number of processes, nor that of worker threads, nor where a run was interrupted changes it: the global
batch of step t is always the same set of images, each augmented in the same way.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from digit.core.errors import DigitError
from digit.core.transforms import Transform, build_transform
from digit.data.dataset import ImageDataset

Positions = NDArray[np.int64]
A = TypeVar("A")
B = TypeVar("B")


class StepSampler:
    """Shuffled batches without end: every epoch is one permutation of the ``length`` images, and a batch may span two.

    ``indices(step)`` depends on (length, batch_size, seed, step) alone. The ranks share the global batch, whose size
    ``world_size`` divides, in equal, disjoint parts, which concatenated by rank are the batch of a single process.
    """

    steps = None  # it never ends

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
        self._permutation = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(length))

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


class OrderedSampler:
    """One pass that sees each image once, in ``order`` (length,) or as they are numbered; the last batch may be
    smaller. The ranks share each global batch in parts that differ by at most one image, and may be empty.
    """

    def __init__(
        self, length: int, batch_size: int, order: Positions | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise DigitError(f"The batch size must be at least 1, not {batch_size}.")
        self.length, self.batch_size = length, batch_size
        self._order = np.arange(length, dtype=np.int64) if order is None else order
        self._rank, self._world_size = rank, world_size

    @property
    def steps(self) -> int:
        """Number of batches, the same for every rank."""
        return -(-self.length // self.batch_size)

    def indices(self, step: int) -> Positions:
        """The images of this rank in batch ``step``."""
        batch = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        return np.array_split(batch, self._world_size)[self._rank]

    def epochs(self, step: int) -> Positions:
        """Zeros: there is one pass, and an image is cut in the same way in every other."""
        return np.zeros_like(self.indices(step))


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of image ``index`` in pass (or step) ``epoch``: one Philox stream each, whoever draws when."""
    # the lowest counter word is left to the draws themselves: 2^64 of them before two streams could meet
    return np.random.Generator(np.random.Philox(key=[seed, 0x617567], counter=[0, 0, epoch, index]))


class Batch(NamedTuple):
    """Images (B, 3, H, W) float32 in 0..1 or uint8, labels (B,) int64, and numbers in the dataset (B,) int64."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor


class Batches:
    """The batches of the steps ``start <= step < stop``, decoded and transformed by threads ahead of their use.

    The output is the same for any number of workers. Iterating again starts again at ``start``.

    Args:
        transform: what is done to each image; its randomness comes from ``sample_rng(seed, epoch, index)``.
        stop: by default the sampler's end, if it has one.
        workers: number of threads, each with ``prefetch`` batches ready; 0 does the work in the caller's.
        dtype: torch.float32 (0..1) or torch.uint8.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: StepSampler | OrderedSampler,
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
        steps = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        yield from map_ahead(self.batch, steps, self.workers, self.workers * self.prefetch)

    def batch(self, step: int) -> Batch:
        """The batch of one step, made here and now; a DigitError where an image cannot be read, or has another size."""
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


def map_ahead(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """``map`` with threads (0: the caller's): the results come in order, and at most ``ahead`` of them are made before
    they are asked for. What ``function`` raises comes out here, and ``items`` may have no end.
    """
    rest = iter(items)
    if not workers:
        yield from map(function, rest)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="digit-data")
    try:
        pending = deque(pool.submit(function, item) for item in islice(rest, max(1, ahead)))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
