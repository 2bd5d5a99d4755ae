"""Writing a dataset in this package's format; see :mod:`digit.data.dataset` for what it looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from digit.core.errors import DigitError
from digit.core.files import write_folder, write_json
from digit.data.dataset import FORMAT, VERSION, read_description
from digit.data.shards import BLOCK, NO_LABEL, IndexBuilder, Span, short_digest, tar_member

SHARD_BYTES = 256 << 20
"""A shard is closed when it has grown to this."""


class DatasetWriter:
    """Takes images one by one; made by :func:`write_dataset`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[str, _Split] = {}
        self._sizes: set[tuple[int, int]] = set()

    def add(
        self, split: str, key: str, data: bytes, extension: str, size: tuple[int, int], label: int = NO_LABEL
    ) -> None:
        """Append an image.

        Args:
            split: such as "train".
            key: unique within the split; its last part has no dot.
            data: the bytes of the image file.
            extension: "png" or "jpg".
            size: (width, height) in pixels.
            label: class id, or -1 for none.
        """
        self._sizes.add(size)
        self.splits.setdefault(split, _Split(self.folder, split)).add(key, data, extension, label)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """The size all images have, or None."""
        return next(iter(self._sizes)) if len(self._sizes) == 1 else None


class _Split:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._builder = IndexBuilder()
        self._handle: BinaryIO | None = None

    def add(self, key: str, data: bytes, extension: str, label: int) -> None:
        if self._handle is None:
            self._handle = open(self._folder / self._shard_name(), "wb")  # noqa: SIM115 - closed by _end_shard or close
        header, padded = tar_member(f"{key}.{extension}", data)
        self._builder.add(Span(key, self._handle.tell() + len(header), len(data), label), short_digest(data))
        self._handle.write(header + padded)
        if label != NO_LABEL:
            self._handle.write(b"".join(tar_member(f"{key}.cls", str(label).encode())))
        if self._handle.tell() >= SHARD_BYTES:
            self._end_shard()

    def finish(self) -> dict[str, object]:
        self._end_shard()
        index = self._builder.build()
        index.save(self._folder / f"{self._name}.index.npz")
        shards = [
            {"name": name, "bytes": size} for name, size in zip(self._builder.shards, self._builder.sizes, strict=True)
        ]
        return {"count": len(index), "checksum": index.fingerprint(), "shards": shards}

    def _shard_name(self) -> str:
        return f"{self._name}-{len(self._builder.shards):05d}.tar"

    def _end_shard(self) -> None:
        if self._handle is not None:
            self._handle.write(b"\0" * 2 * BLOCK)
            size = self._handle.tell()
            self._handle.close()
            self._handle = None
            self._builder.end_shard(self._shard_name(), size)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


@contextmanager
def write_dataset(
    path: str | Path, name: str, classes: Sequence[str], source: str, licence: str, filter: object = None
) -> Iterator[DatasetWriter]:
    """Create a dataset folder; it appears when the block ends without an error, and else not at all.

    An older dataset at ``path`` is replaced.

    Args:
        path: the folder.
        name: of the dataset.
        classes: class names, by id; empty if there are none.
        source: where the images came from, in words.
        licence: what may be done with them, in words.
        filter: how they were resized; None where they were not.

    Raises:
        DigitError: ``path`` is something else than a dataset and is not empty, nothing was added, or the disk is full.
    """
    path = Path(path)
    refuse_to_replace(path)
    with write_folder(path) as folder:
        writer = DatasetWriter(folder)
        try:
            yield writer
            if not writer.splits:
                raise DigitError(f"No image was found for the dataset {path}; nothing was written.")
            splits = {split: part.finish() for split, part in writer.splits.items()}
        finally:
            for part in writer.splits.values():
                part.close()
        checksums = "".join(str(part["checksum"]) for part in splits.values())
        info = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "classes": list(classes),
            "image_size": writer.image_size,
            "source": source,
            "licence": licence,
            **({"filter": filter} if filter else {}),
            "checksum": hashlib.sha256(checksums.encode()).hexdigest(),
            "splits": splits,
        }
        write_json(folder / "dataset.json", info)


def refuse_to_replace(path: Path) -> None:
    """Raise DigitError if something that is not a dataset stands at ``path``, so that nobody's folder is ever
    replaced.
    """
    if path.is_dir() and any(path.iterdir()):
        if not (path / "dataset.json").is_file():
            raise DigitError(f"The folder {path} exists and is not a dataset; choose another --out or empty it first.")
        read_description(path)
    elif path.exists() and not path.is_dir():
        raise DigitError(f"{path} is a file; choose another --out.")
