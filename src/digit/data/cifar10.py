"""CIFAR-10 (Krizhevsky 2009, "Learning multiple layers of features from tiny images"), from any of its usual forms: the
same images in the authors' order, checked against frozen checksums.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from digit.core.errors import DigitError, require
from digit.core.files import cache_folder
from digit.core.hub import out_of_reach
from digit.core.images import decode, encode_png
from digit.core.progress import bar
from digit.data.dataset import refuse_to_replace, write_dataset
from digit.data.sampling import map_ahead

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BLOCK = 10_000
CHECKSUMS: dict[str, tuple[str, ...]] = {
    "train": (
        "8350d89ba6404c270d263d84bf037e74b0158eecac79f27405efcf23445a6997",
        "28d2d506ff2e052a3c902ac74931514d4c22d54b3f23622088bee441ab096cf0",
        "e56532de152c7a77fc2a722499682f2699ce5177bbfac2ed2e415096184fa1d9",
        "bb996a8ffff861dd5cca88c397fdfb884f0c482c5588bd32cea3dc7b648709bb",
        "efb6334c7c1f88ac69032959408d9eeccb983002e83119b66de7309d3d2c7915",
    ),
    "test": ("8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",),
}
"""SHA-256 of each block of 10,000 images in the authors' order: the RGB pixels (10000, 32, 32, 3), then the labels, as
bytes."""

HUB_DATASET = "uoft-cs/cifar10"
LICENCE = (
    "No licence was stated; the authors ask to cite: A. Krizhevsky, Learning Multiple Layers of Features from Tiny "
    "Images, 2009"
)

_NAMES = re.compile(r"data_batch_[1-5]|test_batch|(train|test).*\.parquet")
_MOST_MEMBER_BYTES = 1 << 30
Files = Mapping[str, bytes]


class Split(NamedTuple):
    """Images (n, 32, 32, 3) and labels (n,) of one split."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def build_cifar10(out: str | Path, source: str | Path | None = None) -> Path:
    """Write CIFAR-10 as a dataset folder ``out``, which is given back; an older dataset there is replaced.

    ``source`` is a folder or archive with the original python pickles or the Hub's parquet files. Without it the cache
    and then the Hub are tried. A DigitError says what was tried, or that what was found is not CIFAR-10.
    """
    out = Path(out)
    refuse_to_replace(out)
    splits, origin = load_cifar10(source)
    total = sum(len(split.labels) for split in splits.values())
    with (
        write_dataset(out, "cifar10", CLASSES, origin, LICENCE) as writer,
        bar("Writing CIFAR-10", total) as progress,
    ):
        for name, (pixels, labels) in splits.items():
            files = map_ahead(lambda image: encode_png(Image.fromarray(image)), pixels, os.cpu_count() or 1, 256)
            for i, (data, label) in enumerate(zip(files, labels, strict=True)):
                writer.add(name, f"{i:05d}", data, "png", (32, 32), int(label))
                progress.advance()
    return out


def load_cifar10(source: str | Path | None = None) -> tuple[dict[str, Split], str]:
    """The verified images by split, "train" and "test", and where they came from; see :func:`build_cifar10`."""
    path, origin = (Path(source), Path(source).name) if source is not None else find_cifar10()
    return verify(read_cifar10(path), str(path)), f"CIFAR-10 from {origin}"


def find_cifar10() -> tuple[Path, str]:
    """Where a copy lies, of the cache or else of the Hub, and which of them it is; a DigitError says what was tried."""
    tried = []
    for name, fetch in (("the cache", _from_cache), (f"the Hub dataset {HUB_DATASET}", _from_hub)):
        try:
            return fetch(), name
        except DigitError as error:
            tried.append(f"{name}: {error}")
    raise DigitError(
        f"CIFAR-10 could not be fetched. Tried {' Then '.join(tried)} "
        "Download it elsewhere and give the folder or archive with --source."
    )


def read_cifar10(path: Path) -> dict[str, Split]:
    """Read a local copy in either form, unverified; a DigitError where it is missing, of another form or damaged."""
    files = _read_files(path)
    if "data_batch_1" in files:
        read: Callable[[Files, str], Split] = _read_pickles
    elif any(name.endswith(".parquet") for name in files):
        read = _read_parquet
    else:
        raise DigitError(
            f"{path} does not hold CIFAR-10; expected the python pickles (data_batch_1 ...) or parquet files "
            "(train-*.parquet, test-*.parquet)."
        )
    try:
        return {split: read(files, split) for split in ("train", "test")}
    except KeyError as error:
        raise DigitError(f"{path} is incomplete: there is no {error}.") from error


def verify(splits: dict[str, Split], where: str) -> dict[str, Split]:
    """Check counts and checksums, and bring blocks into the authors' order; a DigitError says what differs."""
    ordered = {}
    for name, (pixels, labels) in splits.items():
        count = BLOCK * len(CHECKSUMS[name])
        if pixels.shape != (count, 32, 32, 3) or labels.shape != (count,):
            raise DigitError(f"{where}: the {name} split holds {len(labels):,} images, CIFAR-10 has {count:,}.")
        blocks = [Split(pixels[i : i + BLOCK], labels[i : i + BLOCK]) for i in range(0, count, BLOCK)]
        known = {block_checksum(block): block for block in blocks}
        if set(known) != set(CHECKSUMS[name]):
            raise DigitError(
                f"{where}: the {name} split does not match CIFAR-10's checksums: pixels or labels differ, or images "
                "are in another order."
            )
        ordered[name] = _joined(known[checksum] for checksum in CHECKSUMS[name])
    return ordered


def _joined(parts: Iterable[Split]) -> Split:
    pixels, labels = zip(*parts, strict=True)
    return Split(np.concatenate(pixels), np.concatenate(labels))


def block_checksum(block: Split) -> str:
    """SHA-256 over the pixels in raster order, then the labels, one byte each."""
    digest = hashlib.sha256(np.ascontiguousarray(block.pixels, dtype=np.uint8).tobytes())
    digest.update(block.labels.astype(np.uint8).tobytes())
    return digest.hexdigest()


# Local forms


def _read_files(path: Path) -> Files:
    """The files that matter by bare name: of a folder to two levels, or of a tar archive, whose names are no paths."""
    if path.is_dir():
        found = [item for pattern in ("*", "*/*") for item in sorted(path.glob(pattern)) if item.is_file()]
        return {item.name: item.read_bytes() for item in reversed(found) if _NAMES.fullmatch(item.name)}
    if not path.is_file():
        raise DigitError(f"There is no folder or archive {path}.")
    try:
        with tarfile.open(path) as tar:  # in one pass, for going back in a compressed file means unpacking it again
            named = ((member.name.rsplit("/", 1)[-1], member) for member in tar if member.size <= _MOST_MEMBER_BYTES)
            known = ((name, tar.extractfile(member)) for name, member in named if _NAMES.fullmatch(name))
            return {name: handle.read() for name, handle in known if handle}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DigitError(f"{path} is not a readable tar archive ({error}); it may be half downloaded.") from error


def _read_parquet(files: Files, split: str) -> Split:
    """The Hub's files: a column of PNG files and a column of labels."""
    parquet = require("pyarrow.parquet", "data", "reading parquet files")
    pixels, labels = [], []
    names = sorted(name for name in files if name.endswith(".parquet") and name.startswith(split))
    if not names:
        raise KeyError(f"{split}-*.parquet")
    for name in names:
        for row in parquet.read_table(io.BytesIO(files[name])).to_pylist():
            cell = next(row[column] for column in ("img", "image") if column in row)
            pixels.append(np.asarray(decode(cell["bytes"], f"an image in {name}").image))
            labels.append(row["label"])
    return Split(np.stack(pixels), np.array(labels, dtype=np.uint8))


def _read_pickles(files: Files, split: str) -> Split:
    """The authors' python batches: (10000, 3072) bytes, the planes of an image one after the other."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _joined(_unpickle(files[name], name) for name in names)


class _BatchUnpickler(pickle.Unpickler):
    """Knows how to rebuild a numpy array out of bytes, and nothing else that a pickle could call."""

    _ALLOWED = (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return super().find_class(module, name)


def _unpickle(data: bytes, name: str) -> Split:
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        planes, labels = batch[b"data"], np.array(batch[b"labels"], dtype=np.uint8)
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3072):
            raise ValueError("its arrays have other shapes")
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise DigitError(f"{name} was refused as a CIFAR-10 batch: {error}.") from error
    return Split(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


# Fetching


def _from_cache() -> Path:
    path = cache_folder() / "cifar10"
    if not any(_NAMES.fullmatch(item.name) for pattern in ("*", "*/*") for item in path.glob(pattern)):
        raise DigitError(f"there is no copy in {path}.")
    return path


def _from_hub() -> Path:
    how: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": ["plain_text/*.parquet"]}
    fetch = partial(huggingface_hub.snapshot_download, HUB_DATASET, **how)
    with suppress(Exception):  # not in the Hub's own cache: ask the network
        return Path(fetch(local_files_only=True))
    if barrier := out_of_reach():
        raise DigitError(f"it is not in the Hub's cache, and {barrier}.")
    try:
        return Path(fetch())
    except Exception as error:  # the library raises many types, down to those of its HTTP client
        raise DigitError(f"it is not in the Hub's cache, and the download failed ({error}).") from error
