"""Where images come from: indexed tar shards, a folder, a Hub dataset. Each gives the bytes, the label and the key of
image i.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from digit.core.errors import DigitError, require
from digit.core.images import EXTENSIONS
from digit.data.shards import NO_LABEL, ShardIndex, read_span, scan_shards, short_digest

logger = logging.getLogger(__name__)
SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})
_FINGERPRINTED = 1024  # whole images read for the fingerprint of a source that keeps no digests


class Source(Protocol):
    """The bytes behind an :class:`~digit.data.dataset.ImageDataset`."""

    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of images."""

    def key(self, i: int) -> str:
        """What image ``i`` is called within the dataset."""

    def where(self, i: int) -> str:
        """How to call image ``i`` in an error."""

    def read(self, i: int) -> bytes:
        """The file of image ``i``; raises DigitError naming what is missing or damaged."""

    def fingerprint(self) -> str:
        """A SHA-256 that identifies the content."""


class ShardSource:
    """Images in indexed tar shards in ``folder``."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder, self.index, self.labels = folder, index, index.label
        self._paths = [str(folder / name) for name in index.shards]
        for name, size in zip(index.shards, index.sizes, strict=True):
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise DigitError(f"The shard {path} is missing.")
            if path.stat().st_size != size:
                raise DigitError(
                    f"The shard {path} has {path.stat().st_size:,} bytes, its index says {size:,}; copy it again."
                )

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        return self.index.key(i)

    def where(self, i: int) -> str:
        return f"image {self.key(i)!r} in the shard {self._path(i)}"

    def read(self, i: int) -> bytes:
        data = read_span(self._path(i), int(self.index.offset[i]), int(self.index.length[i]))
        if len(self.index.digest) and short_digest(data) != self.index.digest[i].tobytes():
            raise DigitError(
                f"The shard {self._path(i)} has changed or is damaged: image {self.key(i)!r} does not match its checksum. "
                "Copy the shard again or build the dataset again."
            )
        return data

    def fingerprint(self) -> str:
        return self.index.fingerprint() if len(self.index.digest) else sampled_fingerprint(self, self.index.length)

    def _path(self, i: int) -> str:
        return self._paths[int(self.index.shard[i])]


class FolderSource:
    """Image files below ``folder``, as :func:`list_folder` finds them."""

    def __init__(self, folder: Path, files: Sequence[str], labels: NDArray[np.int64]) -> None:
        self.folder, self.files, self.labels = folder, files, labels

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        return self.files[i]

    def where(self, i: int) -> str:
        return str(self.folder / self.files[i])

    def read(self, i: int) -> bytes:
        try:
            return (self.folder / self.files[i]).read_bytes()
        except OSError as error:
            raise DigitError(f"Cannot read the image {self.where(i)}: {error.strerror or error}.") from error

    def fingerprint(self) -> str:
        sizes = np.array([(self.folder / name).stat().st_size for name in self.files], dtype=np.int64)
        return sampled_fingerprint(self, sizes)


class HubSource:
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

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, i: int) -> str:
        return f"{i:08d}"

    def where(self, i: int) -> str:
        return f"image {i} of the dataset {self.name}"

    def read(self, i: int) -> bytes:
        cell = self._rows[i][self._column]
        if cell is None:
            raise DigitError(f"There is no picture in the row of {self.where(i)}.")
        data: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        return data

    def fingerprint(self) -> str:
        return sampled_fingerprint(self, np.zeros(0, dtype=np.int64))


class SubsetSource:
    """Some images of another source; ``numbers`` says which, of the source that is no subset itself."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self._source, self._indices, self.labels = source, indices, source.labels[indices]
        self.numbers: NDArray[np.int64] = source.numbers[indices] if isinstance(source, SubsetSource) else indices

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, i: int) -> str:
        return self._source.key(int(self._indices[i]))

    def where(self, i: int) -> str:
        return self._source.where(int(self._indices[i]))

    def read(self, i: int) -> bytes:
        return self._source.read(int(self._indices[i]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._source.fingerprint().encode() + self._indices.tobytes()).hexdigest()


def sampled_fingerprint(source: Source, lengths: NDArray[np.int64]) -> str:
    """SHA-256 over every key, label and length, and over the bytes of at most 1,024 images spread evenly.

    It is for sources that keep no digests: reading a whole ImageNet to name it would take an hour.
    """
    digest = hashlib.sha256(source.labels.tobytes() + lengths.tobytes())
    for i in range(len(source)):
        digest.update(source.key(i).encode() + b"\0")
    for i in np.unique(np.linspace(0, len(source) - 1, min(_FINGERPRINTED, len(source))).round().astype(int)):
        digest.update(short_digest(source.read(int(i))))
    return digest.hexdigest()


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """All files below a folder, as sorted relative paths with ``/``; links to folders are followed, each folder once.

    Returns:
        The files, and apart the hidden ones (a part of the path begins with a dot).
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


class Survey(NamedTuple):
    """What lies in a folder of images."""

    files: list[str]
    """Relative paths with ``/``, sorted."""
    splits: list[str]
    """The split of each file; "train" where the folder is not divided."""
    labels: NDArray[np.int64]
    """The class of each file; -1 for files that lie in no folder of their own."""
    classes: tuple[str, ...]
    """The names of the class folders, sorted; the same for all splits."""
    others: list[str]
    """Hidden files, and files without an image's ending if only images were asked for."""


def survey_folder(folder: Path, images_only: bool) -> Survey:
    """List a folder's files with their classes.

    The first folder of a path is its class. If the folders at the top are all called train, val, valid, validation or
    test, they are splits, and the classes are one level down.
    """
    files, others = list_folder(folder)
    if images_only:
        others = [name for name in files if name.rsplit(".", 1)[-1].lower() not in EXTENSIONS]
        files = sorted(set(files) - set(others))
    tops = {file.split("/")[0] if "/" in file else "" for file in files}
    divided = tops <= SPLIT_NAMES
    splits = [file.split("/")[0] if divided else "train" for file in files]
    inner = [file.split("/", 1)[1] if divided else file for file in files]
    owners = [file.split("/")[0] if "/" in file else None for file in inner]
    classes = tuple(sorted({owner for owner in owners if owner is not None}))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([NO_LABEL if owner is None else number[owner] for owner in owners], dtype=np.int64)
    return Survey(files, splits, labels, classes, others)


def open_folder(folder: Path, split: str) -> tuple[FolderSource, tuple[str, ...]]:
    """A plain folder of images and its classes; files without an image's ending are left out with a warning.

    Raises:
        DigitError: there is no image in it, or no such split.
    """
    survey = survey_folder(folder, images_only=True)
    if not survey.files:
        raise DigitError(f"There is no image in the folder {folder}; it has {len(survey.others)} other files.")
    if split not in survey.splits:
        raise DigitError(
            f"The folder {folder} has no split '{split}'; it has: {', '.join(sorted(set(survey.splits)))}."
        )
    if survey.others:
        logger.warning(
            "%d files in %s do not end like images and are left out: %s",
            len(survey.others),
            folder,
            _some(survey.others),
        )
    chosen = np.flatnonzero(np.array(survey.splits) == split)
    return FolderSource(folder, [survey.files[i] for i in chosen], survey.labels[chosen]), survey.classes


def open_tars(paths: Sequence[Path], cache: Path) -> ShardSource:
    """Foreign tar shards in one folder; their index is kept beside them, or in ``cache`` where that is read-only."""
    folder = paths[0].parent
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    name = f".digit-index-{hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}.npz"
    beside, aside = (
        folder / name,
        cache / "shard-index" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] / name,
    )
    for known in (beside, aside):
        if known.is_file():
            return ShardSource(folder, ShardIndex.load(known))
    index = scan_shards(paths)
    if not len(index):
        raise DigitError(
            f"There is no image in {_some([str(path) for path in paths])}; it is not a WebDataset of images."
        )
    try:
        index.save(beside)
    except DigitError:  # read-only, or full: the index is small, and the home folder may do
        index.save(aside)
    return ShardSource(folder, index)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
