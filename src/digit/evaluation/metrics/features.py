"""One side of a comparison: images, wherever they come from, as Inception statistics and features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.progress import bar
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.inception import PREPROCESSING, FeatureExtractor, tool_name
from digit.evaluation.metrics.statistics import FeatureFile, FeatureStatistics, Moments, load_features, load_statistics

Source = str | Path | FeatureStatistics | Iterable[Tensor]


@dataclass
class FeatureSet:
    """One side of a comparison.

    Attributes:
        name: what the user calls it.
        statistics: for FID.
        features: (n, 2048) float32, where they were kept.
        logits: (n, 1008) float32, where they were kept and the weights have a classifier.
        seconds: what the network took, reading included; 0 for saved statistics.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    logits: Tensor | None = None
    seconds: float = 0.0


class Collector:
    """Takes images batch by batch and keeps what the wanted metrics need: moments for FID, rows only for the others."""

    def __init__(self, extractor: FeatureExtractor, metrics: Iterable[str] = ("fid",)) -> None:
        wanted = set(metrics)
        self.extractor = extractor
        self.moments = Moments()
        self.features = FeatureFile() if wanted & {"kid", "prc"} else None
        self.logits = FeatureFile() if "isc" in wanted and extractor.weights.has_head else None
        self._size: tuple[int, ...] | None = None
        self._began = time.monotonic()

    def add(self, images: Tensor) -> None:
        """Measure (B, 3, H, W) uint8 images.

        Raises:
            DigitError: grey or float images, another size than before, or features that are not finite.
        """
        size = (images.shape[-1], images.shape[-2])
        if self._size not in (None, size):
            raise DigitError(_mixed_sizes(self._size or (), size, f"image {self.moments.n}"))
        features, logits = self.extractor(images)
        self._size = size
        self.moments.update(features)
        if self.features is not None:
            self.features.append(features)
        if self.logits is not None and logits is not None:
            self.logits.append(logits)

    def finish(self, name: str) -> FeatureSet:
        """Everything so far as one side of a comparison."""
        metadata = {
            "tool": tool_name(),
            "backend": self.extractor.backend,
            "weights_source": self.extractor.weights.source,
            "weights_sha256": self.extractor.weights.sha256,
            "classifier_head": self.extractor.weights.has_head,
            "preprocessing": PREPROCESSING,
            "source": name,
            "image_size": list(self._size or ()),
        }
        return FeatureSet(
            name,
            self.moments.statistics(metadata),
            self.features.read() if self.features else None,
            self.logits.read() if self.logits else None,
            time.monotonic() - self._began,
        )


def _mixed_sizes(first: tuple[int, ...], other: tuple[int, ...], where: str) -> str:
    return (
        f"The images have different sizes: {first[0]}x{first[1]} at first, {other[0]}x{other[1]} in {where}. FID compares sets "
        "of one size; bring them to one size first (digit data folder SRC --size N --out DIR), for the way of resizing changes "
        "the value."
    )


def is_statistics(source: Source | None) -> bool:
    """Whether a source is saved statistics rather than images."""
    return isinstance(source, FeatureStatistics) or (isinstance(source, (str, Path)) and Path(source).suffix == ".npz")


def dataset_batches(path: str | Path, split: str | None, batch_size: int) -> tuple[Iterator[Tensor], int]:
    """The images of a folder or data set as (B, 3, H, W) uint8 batches, and how many there are.

    Grey images come as three equal channels, as torch-fidelity reads them. In a folder made by ``digit generate`` or
    ``digit decode`` (00000.png and so on) the overview ``grid.png`` is left out.

    Raises:
        DigitError: nothing there, no images, or images of different sizes.
    """
    dataset = open_dataset(path, split or "train")
    if Path(path, "00000.png").is_file():
        dataset = dataset.subset([index for index in range(len(dataset)) if dataset.source.key(index) != "grid.png"])

    def batches() -> Iterator[Tensor]:
        first = dataset[0].image.size
        for begin in range(0, len(dataset), batch_size):
            arrays = []
            for index in range(begin, min(begin + batch_size, len(dataset))):
                image = dataset[index].image
                if image.size != first:
                    raise DigitError(_mixed_sizes(first, image.size, dataset.source.where(index)))
                arrays.append(np.asarray(image))
            yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)

    return batches(), len(dataset)


def measure(
    source: Source,
    extractor: FeatureExtractor | None,
    metrics: Iterable[str] = ("fid",),
    *,
    batch_size: int = 64,
    name: str | None = None,
    split: str | None = None,
    total: int | None = None,
) -> FeatureSet:
    """Turn one side of a comparison into statistics (and features, where a metric needs them).

    Args:
        source: a folder of images or a data set, a ``.npz`` of statistics, statistics, or any iterator of (B, 3, H, W)
            uint8 batches, such as a sampling run.
        extractor: the network; not needed for statistics.
        metrics: what it will be used for: fid needs statistics alone, kid and prc every feature, isc every logit.
        batch_size: images a step of the network; the values do not depend on it.
        name: how the result calls it; by default the path's last part.
        split: of a data set, such as ``"test"``.
        total: take at most so many images; for an iterator also the length of the progress bar.

    Raises:
        DigitError: see :func:`dataset_batches`, :class:`Collector` and
            :func:`~digit.evaluation.metrics.statistics.load_statistics`.
    """
    if isinstance(source, FeatureStatistics):
        return FeatureSet(name or str(source.metadata.get("source", "statistics")), source)
    if is_statistics(source):
        statistics = load_statistics(str(source))
        features = load_features(str(source)) if {"kid", "prc"} & set(metrics) else None
        return FeatureSet(name or Path(str(source)).name, statistics, features)
    if extractor is None:
        raise DigitError("Measuring images needs the FID network; only saved statistics do without.")
    if isinstance(source, (str, Path)):
        name = name or Path(source).name + (f" ({split})" if split else "")
        batches, count = dataset_batches(source, split, batch_size)
        total = min(total or count, count)
    else:
        batches = iter(source)
    name = name or "images"
    collector = Collector(extractor, metrics)
    with bar(f"Inception features of {name}", total) as progress:
        for images in batches:
            room = len(images) if total is None else total - collector.moments.n
            collector.add(images[:room])
            progress.advance(min(room, len(images)))
            if collector.moments.n == total:
                break
    return collector.finish(name)
