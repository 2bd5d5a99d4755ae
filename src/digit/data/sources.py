"""Where images come from: indexed tar shards, a folder, a Hub dataset. Each gives the bytes, the label and the key of
image i.

`datasets` reads the Hub. Its imagefolder and webdataset loaders are not used for what lies here: the one skips files
without saying so and does not follow links, the other copies every image into its cache and wants one form of sample.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import constants
from numpy.typing import NDArray

from digit.core.errors import DigitError, require
from digit.core.files import cache_folder
from digit.core.hub import out_of_reach, repository_id
from digit.core.images import EXTENSIONS
from digit.data.shards import NO_LABEL, ShardIndex, scan_shards, short_digest

logger = logging.getLogger(__name__)
SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_FINGERPRINTED = 1024  # whole images read for the fingerprint of a source that keeps no digests


class Source:
    """The bytes behind an :class:`~digit.data.dataset.ImageDataset`, with its ``labels`` (n,) and ``classes``."""

    labels: NDArray[np.int64]
    classes: tuple[str, ...] = ()

    def key(self, i: int) -> str:
        """What image ``i`` is called within the dataset."""
        raise NotImplementedError

    def where(self, i: int) -> str:
        """How to call image ``i`` in an error."""
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """The file of image ``i``; raises DigitError naming what is missing or damaged."""
        raise NotImplementedError

    def lengths(self) -> NDArray[np.int64]:
        """(n,) bytes of each image, where that is known without reading them; else (0,)."""
        return np.zeros(0, dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 over keys, labels and lengths, and the bytes of at most 1,024 images: reading all would take an
        hour.
        """
        count = len(self.labels)
        digest = hashlib.sha256(self.labels.tobytes() + self.lengths().tobytes())
        for i in range(count):
            digest.update(self.key(i).encode() + b"\0")
        for i in np.unique(np.linspace(0, count - 1, min(_FINGERPRINTED, count)).round().astype(int)):
            digest.update(short_digest(self.read(int(i))))
        return digest.hexdigest()


class ShardSource(Source):
    """Images in indexed tar shards in ``folder``."""

    def __init__(self, folder: Path, index: ShardIndex, classes: Sequence[str] | None = None) -> None:
        self.index, self.labels = index, index.label
        numbers = range(int(self.labels.max(initial=-1)) + 1)
        self.classes = tuple(map(str, numbers) if classes is None else classes)
        self._paths = [folder / name for name in index.shards]
        for path, name, size in zip(self._paths, index.shards, index.sizes, strict=True):
            if Path(name).name != name or not path.is_file():
                raise DigitError(f"The shard {path} is missing.")
            if path.stat().st_size != size:
                raise DigitError(
                    f"The shard {path} has {path.stat().st_size:,} bytes, its index says {size:,}; copy it again."
                )

    def key(self, i: int) -> str:
        return self.index.key(i)

    def where(self, i: int) -> str:
        return f"image {self.key(i)!r} in the shard {self._paths[self.index.shard[i]]}"

    def read(self, i: int) -> bytes:
        path, offset = self._paths[self.index.shard[i]], int(self.index.offset[i])
        try:
            # opened for each read, which costs microseconds and is safe in threads and in forked processes
            with open(path, "rb", buffering=0) as handle:
                handle.seek(offset)
                data = handle.read(int(self.index.length[i]))
        except FileNotFoundError as error:
            raise DigitError(f"The shard {path} is missing.") from error
        if len(data) != self.index.length[i]:
            raise DigitError(
                f"The shard {path} is truncated: it ends within an image at byte {offset:,}. Copy it again."
            )
        if len(self.index.digest) and short_digest(data) != self.index.digest[i].tobytes():
            raise DigitError(
                f"The shard {path} has changed or is damaged: image {self.key(i)!r} does not match its checksum. "
                "Copy the shard again or build the dataset again."
            )
        return data

    def lengths(self) -> NDArray[np.int64]:
        return self.index.length

    def fingerprint(self) -> str:
        return self.index.fingerprint() if len(self.index.digest) else super().fingerprint()


class FolderSource(Source):
    """Image files below ``folder``."""

    def __init__(self, folder: Path, files: Sequence[str], labels: NDArray[np.int64], classes: tuple[str, ...]) -> None:
        self.folder, self.files, self.labels, self.classes = folder, files, labels, classes

    def key(self, i: int) -> str:
        return self.files[i]

    def where(self, i: int) -> str:
        return str(self.folder / self.files[i])

    def read(self, i: int) -> bytes:
        try:
            return (self.folder / self.files[i]).read_bytes()
        except OSError as error:
            raise DigitError(f"Cannot read the image {self.where(i)}: {error.strerror or error}.") from error

    def lengths(self) -> NDArray[np.int64]:
        return np.array([(self.folder / name).stat().st_size for name in self.files], dtype=np.int64)


class HubSource(Source):
    """A split of a `datasets` dataset with an image column and, if there is one, a class column."""

    def __init__(self, dataset: Any, name: str) -> None:
        datasets = require("datasets", "data", "Opening a Hub dataset")
        columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise DigitError(f"The dataset {name} has no image column; it has: {', '.join(dataset.features)}.")
        self.name, self._column = name, columns[0]
        self._rows = dataset.cast_column(columns[0], datasets.Image(decode=False))
        label = next((c for c, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)), None)
        self.classes = tuple(dataset.features[label].names) if label else ()
        values = dataset[label][:] if label else [NO_LABEL] * len(dataset)
        self.labels = np.array([NO_LABEL if value is None else value for value in values], dtype=np.int64)

    def key(self, i: int) -> str:
        return f"{i:08d}"

    def where(self, i: int) -> str:
        return f"image {i} of the dataset {self.name}"

    def read(self, i: int) -> bytes:
        cell = self._rows[i][self._column]
        if cell is None:
            raise DigitError(f"There is no image in the row of {self.where(i)}.")
        data: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return data


class Survey(NamedTuple):
    """What lies in a folder: of each of its ``files``, as sorted relative paths, the split and the class (-1: none).

    ``others`` are hidden files, and files without an image's ending if only images were asked for.
    """

    files: list[str]
    splits: list[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    others: list[str]


def survey_folder(folder: Path, images_only: bool) -> Survey:
    """List a folder's files; the first folder of a path is the class. If those at the top are all called train, val,
    valid, validation or test, they are splits, and the classes are one level down.
    """
    files, others = list_folder(folder)
    if images_only:
        others = [name for name in files if name.rsplit(".", 1)[-1].lower() not in EXTENSIONS]
        files = sorted(set(files) - set(others))
    divided = {file.partition("/")[0] if "/" in file else "" for file in files} <= SPLIT_NAMES
    splits = [file.partition("/")[0] if divided else "train" for file in files]
    inner = [file.partition("/")[2] if divided else file for file in files]
    owners = [file.rpartition("/")[0].partition("/")[0] for file in inner]
    classes = tuple(sorted({owner for owner in owners if owner}))
    number = {"": NO_LABEL, **{name: i for i, name in enumerate(classes)}}
    labels = np.array([number[owner] for owner in owners], dtype=np.int64)
    return Survey(files, splits, labels, classes, others)


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """All files below a folder, and apart the hidden ones, as sorted relative paths; links to folders are followed
    once.
    """
    files: list[str] = []
    hidden: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(root, name).relative_to(folder)
            (hidden if any(part.startswith(".") for part in path.parts) else files).append(path.as_posix())
    return sorted(files), sorted(hidden)


def open_folder(folder: Path, split: str) -> FolderSource:
    """A plain folder of images; other files are left out with a warning. A DigitError where there is no such split."""
    files, splits, labels, classes, others = survey_folder(folder, images_only=True)
    if not files:
        raise DigitError(f"There is no image in the folder {folder}; it has {len(others)} other files.")
    if split not in splits:
        raise DigitError(f"The folder {folder} has no split '{split}'; it has: {', '.join(sorted(set(splits)))}.")
    if others:
        logger.warning("%d files in %s do not end like images and are left out: %s", len(others), folder, _some(others))
    chosen = np.flatnonzero(np.array(splits) == split)
    return FolderSource(folder, [files[i] for i in chosen], labels[chosen], classes)


def open_tars(paths: Sequence[Path], split: str) -> ShardSource:
    """Foreign tar shards in one folder, with an index beside them or in the cache; a DigitError where none has
    images.
    """
    folder = paths[0].parent
    parts = {re.split(r"[-_.]", path.name)[0] for path in paths}
    divided = parts <= SPLIT_NAMES
    if split not in (parts if divided else {"train"}):
        held = f"they have: {', '.join(sorted(parts))}" if divided else "they are not divided"
        raise DigitError(f"The shards of {folder} have no split '{split}'; {held}.")
    paths = [path for path in paths if path.name.startswith(split)] if divided else paths
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = f".digit-index-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.npz"
    cached = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    beside, aside = folder / name, cache_folder() / "shard-index" / cached / name
    for known in (beside, aside):
        if known.is_file():
            return ShardSource(folder, ShardIndex.load(known))
    index = scan_shards(paths)
    if not len(index):
        raise DigitError(f"There is no image in {_some(list(map(str, paths)))}; it is not a WebDataset of images.")
    try:
        index.save(beside)
    except DigitError:  # read-only, or full: the index is small, and the home folder may do
        index.save(aside)
    return ShardSource(folder, index)


def open_hub(name: str, split: str) -> HubSource:
    """A dataset of the Hub, or of the cache of `datasets`; a DigitError says what was tried."""
    repository_id(name, "dataset")
    tried = f"There is no folder or file {name}, so a Hub dataset of that name was tried"
    try:
        datasets = require("datasets", "data", "opening a Hub dataset")
    except DigitError as error:
        raise DigitError(f"{tried}, but {error}") from error
    barrier, offline = out_of_reach(), constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = bool(barrier)  # then the cache alone is asked, instead of the network six times
        return HubSource(datasets.load_dataset(name, split=split), name)
    except DigitError:
        raise
    except Exception as error:  # the library raises many types, down to those of its HTTP client
        reason = f"it is not in the cache, and {barrier}" if barrier else str(error).splitlines()[0]
        raise DigitError(f"{tried} (the local cache first, then the Hub), which failed: {reason}.") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
