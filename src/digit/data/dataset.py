"""Image datasets: one map-style class over every source, and the folder format that this package writes.

The format: a folder with ``dataset.json`` (name, classes, counts, image size, source, licence, checksum), tar shards in
the WebDataset convention (``train-00000.tar`` with ``KEY.png`` and ``KEY.cls``), and for each split an index
(``train.index.npz``). The shards stream with any WebDataset reader; through the index any image is one read.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from digit.core.errors import DigitError
from digit.core.files import read_json, write_folder, write_json
from digit.core.images import decode
from digit.core.progress import bar, track
from digit.data.shards import BLOCK, NO_LABEL, Shard, ShardIndex, Span, short_digest, tar_member
from digit.data.sources import ShardSource, Source, open_folder, open_hub, open_tars

FORMAT = "digit-dataset"
VERSION = 1
SHARD_BYTES = 256 << 20  # a shard is closed when it has grown to this
_MEMORY_BYTES = 2 << 30
_CHUNK = 512


class Sample(NamedTuple):
    """One image of a dataset, 8-bit RGB, with its class id, or -1 for none."""

    image: Image.Image
    label: int
    key: str


class ImageDataset:
    """Images by number: ``ds[i] -> Sample``. Reading is safe from many threads.

    Attributes:
        split: such as "train".
        classes: class names; empty if there are no classes.
        image_size: (width, height) if all images are known to have it, else None.
        filter: how ``digit data folder --size`` scaled them, if it did.
        numbers: (n,) int64, where its images stand in the whole source, of which it may be a part.
        labels: (n,) int64, -1 for none.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        split: str,
        image_size: tuple[int, int] | None = None,
        filter: str | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.source, self.name, self.split, self.image_size, self.filter = source, name, split, image_size, filter
        self.classes, self._whole = source.classes, numbers is None
        self.numbers = np.arange(len(source.labels)) if numbers is None else numbers
        self.labels = source.labels if numbers is None else source.labels[numbers]
        self._arrays: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Sample:
        """Image ``i``; negative counts from the end. A DigitError names a file or shard that is missing or damaged."""
        number = int(self.numbers[i])
        image = decode(self.source.read(number), self.where(i)).image
        return Sample(image, int(self.labels[i]), self.source.key(number))

    def where(self, i: int) -> str:
        """How to call image ``i`` in an error."""
        return self.source.where(int(self.numbers[i]))

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that identify keys, labels, class names and the images' bytes: of our own format all,
        of other sources every length and the bytes of up to 1,024 images.
        """
        source = self.source.fingerprint()
        if not self._whole:
            source = hashlib.sha256(source.encode() + self.numbers.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps(self.classes).encode() + source.encode()).hexdigest()

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageDataset:
        """A dataset of these images, in this order."""
        numbers = self.numbers[np.asarray(indices, dtype=np.int64)]
        return ImageDataset(self.source, self.name, self.split, self.image_size, self.filter, numbers)

    @property
    def in_memory(self) -> bool:
        """Whether :meth:`arrays` is known to work and to stay under 2 GiB."""
        return self.image_size is not None and self._bytes(self.image_size) <= _MEMORY_BYTES

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Pixels (n, H, W, 3) uint8 and labels (n,), decoded once and kept; a DigitError for other sizes or above 2
        GiB.
        """
        with self._lock:
            if self._arrays is None:
                self._arrays = self._decode_all()
        return self._arrays, self.labels

    def verify(self) -> None:
        """Read and decode every image; a DigitError names the first shard or file that is damaged or changed."""
        for i in track(range(len(self)), f"Verifying {self.name} {self.split}"):
            self[i]

    def _bytes(self, size: tuple[int, int]) -> int:
        return len(self) * size[0] * size[1] * 3

    def _decode_all(self) -> NDArray[np.uint8]:
        width, height = size = self.image_size or self[0].image.size
        if self._bytes(size) > _MEMORY_BYTES:
            raise DigitError(
                f"{self.name} {self.split} has {len(self):,} images of {width}x{height}, too many to hold in memory; "
                "import them smaller with: digit data folder SRC --size N --out DIR"
            )
        pixels = np.empty((len(self), height, width, 3), dtype=np.uint8)

        def fill(numbers: range) -> int:
            for i in numbers:
                image = self[i].image
                if image.size != size:
                    raise DigitError(
                        f"{self.where(i)} is {image.width}x{image.height}, others are {width}x{height}; import "
                        "them at one size with: digit data folder SRC --size N --out DIR"
                    )
                pixels[i] = np.asarray(image)
            return len(numbers)

        chunks = [range(len(self))[start : start + _CHUNK] for start in range(0, len(self), _CHUNK)]
        with (
            bar(f"Decoding {self.name} {self.split}", len(self)) as progress,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for count in pool.map(fill, chunks):
                progress.advance(count)
        return pixels


def open_dataset(path: str | Path, split: str = "train") -> ImageDataset:
    """Open images wherever they are; a DigitError says what was tried, or that a shard is missing, damaged or changed.

    Args:
        path: a folder made by ``digit data``; a plain folder of images, flat or class-per-folder, with or without a
            level ``train/``, ``val/`` above; WebDataset tar shards (a file, a folder, or a pattern such as
            ``"shards/*.tar"``), whose index is built once; or the id of a Hub dataset such as ``"uoft-cs/cifar10"``.
            What exists on disk comes before the Hub.
        split: which part; a source that is not divided is all ``"train"``.
    """
    text, place = str(path), Path(path)
    if place.is_dir():
        if (place / "dataset.json").is_file():
            return _open_own(place, split)
        tars = sorted(place.glob("*.tar"))
        return ImageDataset(open_tars(tars, split) if tars else open_folder(place, split), place.name, split)
    if place.is_file() and place.suffix == ".tar":
        return ImageDataset(open_tars([place], split), place.stem, split)
    if place.is_file():
        raise DigitError(
            f"{place} is a file, expected a folder of images, tar shards, or a dataset made by `digit data`."
        )
    if any(character in text for character in "*?["):
        found = sorted(place.parent.glob(place.name))
        if not found:
            raise DigitError(f"No file matches {text}.")
        return ImageDataset(open_tars(found, split), place.parent.name, split)
    return ImageDataset(open_hub(text, split), text, split)


def read_description(folder: Path) -> dict[str, Any]:
    """The ``dataset.json`` of a folder; a DigitError where it is missing, of another kind, or of a newer version."""
    info = read_json(folder / "dataset.json")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DigitError(f"{folder / 'dataset.json'} does not describe a dataset made by `digit data`.")
    if info.get("version") != VERSION:
        raise DigitError(
            f"{folder} is a dataset of format version {info.get('version')}; this release reads version {VERSION}. "
            "Build the dataset again or install a matching release."
        )
    return info


def _open_own(folder: Path, split: str) -> ImageDataset:
    info = read_description(folder)
    if split not in info["splits"]:
        raise DigitError(f"The dataset {folder} has no split '{split}'; it has: {', '.join(info['splits'])}.")
    path = folder / f"{split}.index.npz"
    index = ShardIndex.load(path)
    if index.fingerprint() != info["splits"][split]["checksum"]:
        raise DigitError(
            f"The index {path} does not match the checksum in dataset.json: one of them has changed. "
            "Copy or build the dataset again."
        )
    size = tuple(info["image_size"]) if info["image_size"] else None
    source = ShardSource(folder, index, info["classes"])
    return ImageDataset(source, info["name"], split, size, info.get("filter"))


class DatasetWriter:
    """Takes images one by one; made by :func:`write_dataset`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[str, list[Shard]] = {}
        self.sizes: set[tuple[int, int]] = set()

    def add(
        self, split: str, key: str, data: bytes, extension: str, size: tuple[int, int], label: int = NO_LABEL
    ) -> None:
        """Append the bytes of a png or jpg of ``size`` (width, height). The last part of a unique ``key`` has no
        dot.
        """
        self.sizes.add(size)
        shards = self.splits.setdefault(split, [])
        if not shards or shards[-1].size >= SHARD_BYTES:
            self._end(shards)
            shards.append(Shard(f"{split}-{len(shards):05d}.tar"))
        header, padded = tar_member(f"{key}.{extension}", data)
        offset = shards[-1].size + len(header)
        shards[-1].spans.append(Span(key, offset, len(data), label, short_digest(data)))
        text = tar_member(f"{key}.cls", str(label).encode()) if label != NO_LABEL else ()
        self._append(shards[-1], b"".join([header, padded, *text]))

    def finish(self) -> dict[str, dict[str, object]]:
        """Write the index of each split, and describe the splits."""
        described: dict[str, dict[str, object]] = {}
        for split, shards in self.splits.items():
            self._end(shards)
            index = ShardIndex.of(shards)
            index.save(self.folder / f"{split}.index.npz")
            files = [{"name": shard.name, "bytes": shard.size} for shard in shards]
            described[split] = {"count": len(index), "checksum": index.fingerprint(), "shards": files}
        return described

    def _end(self, shards: list[Shard]) -> None:
        if shards:
            self._append(shards[-1], b"\0" * 2 * BLOCK)

    def _append(self, shard: Shard, data: bytes) -> None:
        with open(self.folder / shard.name, "ab") as handle:
            handle.write(data)
        shard.size += len(data)


@contextmanager
def write_dataset(
    path: str | Path, name: str, classes: Sequence[str], source: str, licence: str, filter: object = None
) -> Iterator[DatasetWriter]:
    """Create a dataset folder; it appears when the block ends without an error, and else not at all. An older dataset
    at ``path`` is replaced.

    ``source`` and ``licence`` say in words where the images came from and what may be done with them, ``filter`` how
    they were resized, if they were. A DigitError where ``path`` is something else than a dataset and is not empty,
    nothing was added, or the disk is full.
    """
    path = Path(path)
    refuse_to_replace(path)
    with write_folder(path) as folder:
        writer = DatasetWriter(folder)
        yield writer
        if not writer.splits:
            raise DigitError(f"No image was found for the dataset {path}; nothing was written.")
        splits = writer.finish()
        checksums = "".join(str(part["checksum"]) for part in splits.values())
        info = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "classes": list(classes),
            "image_size": writer.sizes.pop() if len(writer.sizes) == 1 else None,
            "source": source,
            "licence": licence,
            **({"filter": filter} if filter else {}),
            "checksum": hashlib.sha256(checksums.encode()).hexdigest(),
            "splits": splits,
        }
        write_json(folder / "dataset.json", info)


def refuse_to_replace(path: Path) -> None:
    """Raise DigitError if something that is not a dataset stands at ``path``: nobody's folder is ever replaced."""
    if path.is_dir() and any(path.iterdir()):
        if not (path / "dataset.json").is_file():
            raise DigitError(f"The folder {path} exists and is not a dataset; choose another --out or empty it first.")
        read_description(path)
    elif path.exists() and not path.is_dir():
        raise DigitError(f"{path} is a file; choose another --out.")
