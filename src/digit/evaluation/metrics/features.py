"""One side of a comparison: images, wherever they come from, as Inception statistics and features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import cache_folder
from digit.core.progress import bar
from digit.core.transforms import center_crop, resize_shorter
from digit.data.dataset import ImageDataset, open_dataset
from digit.evaluation.metrics.inception import PREPROCESSING, TorchExtractor, tool_name
from digit.evaluation.metrics.statistics import (
    FeatureFile,
    FeatureSet,
    FeatureStatistics,
    Moments,
    load_set,
    npz_arrays,
    save_statistics,
)
from digit.evaluation.steps import Steps
from digit.pipeline.image_array import ImageArray

Source = str | Path | FeatureStatistics | Iterable[Tensor]
FEW = 10_000
"""FID of so many images or fewer is extrapolated, for which their features are kept."""
PACKAGED = Path(__file__).parents[2] / "packaged"
"""Statistics that come with the package: ``NAME.npz``."""


class Collector:
    """Takes images batch by batch and keeps what the wanted metrics need: moments for FID, rows only for the others."""

    def __init__(self, extractor: TorchExtractor, metrics: Iterable[str] = ("fid",)) -> None:
        wanted = set(metrics)
        self.extractor = extractor
        self.moments = Moments()
        self.spatial = Moments() if "sfid" in wanted else None
        self.features = FeatureFile() if wanted & {"fid", "kid", "prc"} else None
        self.logits = FeatureFile() if "isc" in wanted and extractor.weights.has_head else None
        self._most = None if wanted & {"kid", "prc"} else FEW
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
        found = self.extractor(images)
        self._size = size
        self.moments.update(found.features)
        if self.spatial is not None:
            self.spatial.update(found.spatial)
        if self._most is not None and self.moments.n > self._most:
            self.features = None
        if self.features is not None:
            self.features.append(found.features)
        if self.logits is not None and found.logits is not None:
            self.logits.append(found.logits)

    def finish(self, name: str, **more: Any) -> FeatureSet:
        """Everything so far as one side of a comparison; ``more`` goes into its metadata."""
        metadata = {
            "tool": tool_name(),
            "backend": self.extractor.backend,
            "weights_source": self.extractor.weights.source,
            "weights_sha256": self.extractor.weights.sha256,
            "classifier_head": self.extractor.weights.has_head,
            "preprocessing": PREPROCESSING,
            "source": name,
            "image_size": list(self._size or ()),
            **more,
        }
        return FeatureSet(
            name,
            self.moments.statistics(metadata),
            self.features.read() if self.features else None,
            self.logits.read() if self.logits else None,
            self.spatial.statistics(metadata) if self.spatial else None,
            time.monotonic() - self._began,
        )


def _mixed_sizes(first: tuple[int, ...], other: tuple[int, ...], where: str) -> str:
    return (
        f"The images have different sizes: {first[0]}x{first[1]} at first, {other[0]}x{other[1]} in {where}. FID "
        "compares sets of one size; bring them to one size first (digit data folder SRC --size N --out DIR), for the "
        "way of resizing changes the value."
    )


def packaged_statistics() -> dict[str, Path]:
    """The references that come with the package, by name."""
    return {path.stem: path for path in sorted(PACKAGED.glob("*.npz"))}


def is_statistics(source: Source | None, metrics: Iterable[str] = ("fid",)) -> bool:
    """Whether a source has all that the metrics need without the network: statistics, with features for KID and
    precision.
    """
    if isinstance(source, FeatureStatistics):
        return True
    if not isinstance(source, (str, Path)) or (path := _statistics_file(source)) is None:
        return False
    return not ({"kid", "prc"} & set(metrics) and {"arr_0", "features"} & npz_arrays(path) == {"arr_0"})


def _statistics_file(source: str | Path) -> Path | None:
    """The file of a packaged name, or of a path to an ``.npz`` with statistics."""
    path = Path(source)
    if path.suffix == ".npz":
        arrays = npz_arrays(path)
        return path if "mu" in arrays or "arr_0" not in arrays else None
    return None if path.exists() else packaged_statistics().get(str(source))


def dataset_batches(
    dataset: ImageDataset, batch_size: int, size: int | None = None, filter: str = "bicubic"
) -> Iterator[Tensor]:
    """Images as (B, 3, H, W) uint8 batches; grey ones come as three equal channels, as torch-fidelity reads them.

    Args:
        size: scale the shorter side to so many pixels with ``filter`` and cut out the middle.

    Raises:
        DigitError: images of different sizes.
    """
    first = None
    for begin in range(0, len(dataset), batch_size):
        arrays = []
        for index in range(begin, min(begin + batch_size, len(dataset))):
            image = dataset[index].image
            image = image if size is None else center_crop(resize_shorter(image, size, filter), size)
            first = first or image.size
            if image.size != first:
                raise DigitError(_mixed_sizes(first, image.size, dataset.where(index)))
            arrays.append(np.asarray(image))
        yield torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)


def measure(
    source: Source,
    extractor: TorchExtractor | None,
    metrics: Iterable[str] = ("fid",),
    *,
    batch_size: int = 64,
    name: str | None = None,
    split: str | None = None,
    total: int | None = None,
    spread: bool = False,
    size: int | None = None,
    filter: str = "bicubic",
    cache: bool = False,
) -> FeatureSet:
    """Turn one side of a comparison into statistics (and features, where a metric needs them).

    Args:
        source: a folder of images or a data set; an ``.npz`` of statistics, of images, or of both; the name of packaged
            statistics; statistics; or any iterator of (B, 3, H, W) uint8 batches, such as a sampling run.
        extractor: the network; not needed for statistics.
        metrics: what it will be used for: fid and sfid need statistics alone, kid and prc every feature, isc every
            logit.
        batch_size: images a step of the network; the values do not depend on it.
        name: how the result calls it; by default the path's last part.
        split: of a data set, such as ``"test"``.
        total: take at most so many images, the first ones; for an iterator also the length of the progress bar.
        spread: take them at equal distances from a data set, for data sets are often sorted by class.
        size, filter: see :func:`dataset_batches`.
        cache: keep the statistics of a data set, by its content, size, filter and network, and take them from there.

    Raises:
        DigitError: images or statistics that cannot be used, or part of saved statistics was asked for.
    """
    wanted = set(metrics)
    if isinstance(source, FeatureStatistics):
        return FeatureSet(name or str(source.metadata.get("source", "statistics")), source)
    if not isinstance(source, (str, Path)):
        return _gather(source, extractor, wanted, name or "images", total)
    if file := _statistics_file(source):
        if total is not None:
            raise DigitError(f"{total} images of {source} were asked for, but saved statistics cannot be divided.")
        found = load_set(file, features=bool({"kid", "prc"} & wanted))
        if not is_statistics(source, wanted):  # as ADM's evaluator does for precision and recall
            images = ImageArray(file)
            rows = _gather(images.batches(batch_size), extractor, wanted, file.name, len(images))
            found = replace(found, features=rows.features)
        return replace(found, name=name or found.name)
    if Path(source).suffix == ".npz":
        images = ImageArray(source)
        count = min(total or len(images), len(images))
        return _gather(images.batches(batch_size), extractor, wanted, name or images.path.name, count)
    dataset = open_dataset(source, split or "train")
    if Path(source, "00000.png").is_file():  # of digit generate or digit decode, whose grid.png is an overview
        dataset = dataset.subset([index for index in range(len(dataset)) if dataset.source.key(index) != "grid.png"])
    if total is not None and total < len(dataset):
        dataset = dataset.subset(np.arange(total) * len(dataset) // total if spread else np.arange(total))
    name = name or Path(source).name + (f" ({split})" if split else "")
    used = filter if size else dataset.filter

    def gather() -> FeatureSet:
        batches = dataset_batches(dataset, batch_size, size, filter)
        return _gather(batches, extractor, wanted, name, len(dataset), filter=used, size=size)

    if not cache or wanted & {"kid", "prc", "isc"} or extractor is None:
        return gather()
    inputs = {"data": dataset.fingerprint, "size": size, "filter": used, "spatial": "sfid" in wanted}
    inputs |= {"weights": extractor.weights.sha256, "backend": extractor.backend}

    def save(folder: Path) -> None:
        made = gather()
        save_statistics(folder / "statistics.npz", made.statistics, spatial=made.spatial)

    step = Steps(cache_folder() / "statistics").run("inception", inputs, save)
    return replace(load_set(step.folder / "statistics.npz"), name=name)


def _gather(
    batches: Iterable[Tensor],
    extractor: TorchExtractor | None,
    wanted: set[str],
    name: str,
    total: int | None,
    **more: Any,
) -> FeatureSet:
    if extractor is None:
        raise DigitError("Measuring images needs the FID network; only saved statistics do without.")
    collector = Collector(extractor, wanted)
    with bar(f"Inception features of {name}", total) as progress:
        for images in batches:
            room = len(images) if total is None else total - collector.moments.n
            collector.add(images[:room])
            progress.advance(min(room, len(images)))
            if collector.moments.n == total:
                break
    return collector.finish(name, **more)
