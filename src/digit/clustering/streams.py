"""Streams of feature vectors that several processes share: who reads what, and a uniform sample that does not depend on
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from digit.data.sampling import OrderedSampler

_CHUNK = 65536  # vectors of a sample at a time


class Points(NamedTuple):
    """A part of a stream: vectors (n, D) float32 on the device that computes, and their own numbers (n,) int64."""

    numbers: Tensor
    features: Tensor


Stream = Callable[[int], Iterable[Points]]
"""Gives the vectors of this process in a pass, the same ones in every pass; called with the number of the pass."""


class Vectors(NamedTuple):
    """What a codebook is fitted to: the vectors of this process, from the pass number ``passes`` on.

    ``first`` (m, D) are some of all vectors in random order, the same in every process: first centroids come from them.
    What is ``held`` lies in memory, so what is made of it may, too.
    """

    stream: Stream
    first: Tensor
    passes: int = 0
    held: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Vectors:
        """The vectors (n, D) as ``change`` makes them, (n, E)."""

        def changed(number: int) -> Iterator[Points]:
            return (Points(points.numbers, change(points.features)) for points in self.stream(number))

        parts = list(changed(self.passes)) if self.held else []
        return self._replace(stream=(lambda _: parts) if self.held else changed, first=change(self.first))


class PassSampler(OrderedSampler):
    """All images once, in a random order that depends on (seed, number of the pass), shared by the processes."""

    def __init__(self, length: int, batch_size: int, seed: int, number: int, rank: int = 0, world: int = 1) -> None:
        order = np.random.default_rng([seed, number]).permutation(length)
        super().__init__(length, batch_size, order, rank, world)


class Sample:
    """A uniform sample of a stream that several processes share: the vectors whose hashed numbers are the smallest.

    It depends on the seed and the numbers alone, not on the order nor on who reads what.

    Attributes:
        seen: vectors that went by in all processes; final after :meth:`settle`.
        total: size of the sample over all processes.
    """

    def __init__(self, capacity: int, seed: int, width: int) -> None:
        self._capacity, self._seed = capacity, seed
        empty = torch.zeros(0, dtype=torch.long)
        # (keys, numbers, features): first what belongs to the sample so far, smallest key first; then what waits
        self._parts: list[tuple[Tensor, ...]] = [(empty, empty, torch.zeros(0, width))]
        self.seen = self.total = 0
        self._limit = torch.iinfo(torch.int64).max

    @property
    def points(self) -> Points:
        """The part of this process, on the CPU, smallest hash first; final after :meth:`settle`."""
        return Points(*self._parts[0][1:])

    def add(self, points: Points) -> None:
        """Show it the next vectors."""
        self.seen += len(points.numbers)
        keys = hashed(points.numbers, self._seed)
        small = keys < self._limit
        features = points.features[small.to(points.features.device)].cpu()
        self._parts.append((keys[small], points.numbers[small], features))
        if sum(len(part[0]) for part in self._parts[1:]) > self._capacity // 4 + _CHUNK:
            self._merge()

    def settle(self, device: str | torch.device) -> None:
        """Agree with the other processes on which vectors belong to the sample."""
        self._merge()
        keys = self._parts[0][0]
        everyones = gathered(keys.to(device)).cpu().sort().values[: self._capacity]
        self.total = len(everyones)
        mine = int((keys <= everyones[-1]).sum()) if self.total else 0
        self._parts = [tuple(values[:mine] for values in self._parts[0])]
        self.seen = int(summed(torch.tensor([self.seen], device=device)))

    def smallest(self, count: int, device: str | torch.device) -> Tensor:
        """The ``count`` vectors (m, D) of the sample with the smallest hashes, of all processes."""
        keys, _, features = (gathered(values[:count].to(device)) for values in self._parts[0])
        return features[keys.argsort()[:count]]

    def stream(self, device: str | torch.device) -> Stream:
        """The part of the sample that lies here, in every pass."""

        def parts(_number: int) -> Iterator[Points]:
            for numbers, features in zip(*(torch.split(values, _CHUNK) for values in self.points), strict=True):
                yield Points(numbers, features.to(device))

        return parts

    def forget(self) -> None:
        """Give the memory back."""
        self._parts = [tuple(values[:0].clone() for values in self._parts[0])]

    def _merge(self) -> None:
        keys, numbers, features = (torch.cat(values) for values in zip(*self._parts, strict=True))
        keys, order = keys.sort()
        keys, order = keys[: self._capacity].clone(), order[: self._capacity]
        self._parts = [(keys, numbers[order], features[order])]
        if len(keys) == self._capacity:
            self._limit = int(keys[-1])


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Join the processes that ``torchrun`` started, if it did, for as long as the block runs: the number of this
    process, how many there are, and its device, a GPU of its own.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world, device
    finally:
        dist.destroy_process_group()


def together() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(value: Tensor) -> Tensor:
    """The sum over the processes."""
    if together():
        value = value.clone()
        dist.all_reduce(value)
    return value


def gathered(value: Tensor) -> Tensor:
    """The rows of all processes, one after the other; each may have another number of them."""
    if not together():
        return value
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value.cpu())
    return torch.cat(parts).to(value.device)


def hashed(numbers: Tensor, seed: int) -> Tensor:
    """A random-looking (n,) int64, 0 or more, for each number and seed: splitmix64's finalizer (Steele et al. 2014)."""
    x = numbers.cpu().numpy().astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x >> np.uint64(1)).astype(np.int64))
