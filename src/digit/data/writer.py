"""Writing a dataset in this package's format; see :mod:`digit.data.dataset` for what it looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from digit.core.errors import DigitError
from digit.core.files import write_folder, write_json
from digit.data.dataset import FORMAT, VERSION, read_description
from digit.data.shards import BLOCK, NO_LABEL, Shard, ShardIndex, Span, short_digest, tar_member

SHARD_BYTES = 256 << 20
"""A shard is closed when it has grown to this."""


class DatasetWriter:
    """Takes images one by one; made by :func:`write_dataset`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits: dict[str, list[Shard]] = {}
        self.sizes: set[tuple[int, int]] = set()

    def add(
        self, split: str, key: str, data: bytes, extension: str, size: tuple[int, int], label: int = NO_LABEL
    ) -> None:
        """Append an image of ``size`` (width, height), whose file has the bytes ``data`` and the ``extension`` "png" or
        "jpg". The ``key`` is unique within the split; its last part has no dot.
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

    Args:
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
