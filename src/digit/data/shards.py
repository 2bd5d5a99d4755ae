"""Tar shards in the WebDataset convention, with an index that makes every image one read away.

A shard is a plain tar file; a sample is a run of members with one key, the name up to the first dot of its last part:
``KEY.png`` or ``KEY.jpg``, and ``KEY.cls`` (the class id as text) or ``KEY.json`` (with a field ``label``). The index
holds where each image lies, so shards can be streamed in order or read at random. Names in archives are keys; they are
never used as paths.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from digit.core.errors import DigitError
from digit.core.files import write_file
from digit.core.images import EXTENSIONS
from digit.core.progress import track

BLOCK = 512  # tar pads everything to this
_MOST_LABEL_BYTES = 1 << 20
_LABEL_FIELDS = ("label", "cls", "class")
NO_LABEL = -1


class Span(NamedTuple):
    """One image inside a shard."""

    key: str
    offset: int
    length: int
    label: int


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of one split lie. Arrays have one entry an image, in the order of the shards."""

    shards: tuple[str, ...]
    """File names, without folders."""
    sizes: NDArray[np.int64]
    """Bytes of each shard."""
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int64]
    """Class ids; -1 where an image has none."""
    key_text: NDArray[np.uint8]
    """All keys in UTF-8, one after the other."""
    key_end: NDArray[np.int64]
    digest: NDArray[np.uint8]
    """(n, 16): the first half of the SHA-256 of each image's bytes; (0, 16) where it is not known."""

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        """The key of image ``i``."""
        start = int(self.key_end[i - 1]) if i else 0
        return self.key_text[start : int(self.key_end[i])].tobytes().decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """SHA-256 over the keys, labels, lengths and digests in order: the same images in other shards give the
        same.
        """
        digest = hashlib.sha256()
        for array in (self.key_text, self.key_end, self.label, self.length, self.digest):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write as NPZ."""
        arrays = {name: value for name, value in vars(self).items() if name != "shards"}
        shards = np.frombuffer(json.dumps(self.shards).encode(), dtype=np.uint8)

        def write(aside: Path) -> None:
            with open(aside, "wb") as handle:
                np.savez_compressed(handle, shards=shards, **arrays)

        return write_file(path, write)

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read what :meth:`save` wrote.

        Raises:
            DigitError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values: dict[str, Any] = {name: arrays[name] for name in cls.__dataclass_fields__}
            values["shards"] = tuple(json.loads(values["shards"].tobytes()))
        except FileNotFoundError as error:
            raise DigitError(f"There is no index {path}; the dataset folder is incomplete.") from error
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DigitError(f"The index {path} is damaged ({error}); build or copy the dataset again.") from error
        return cls(**values)


class IndexBuilder:
    """Collects spans, shard by shard, into a :class:`ShardIndex`."""

    def __init__(self) -> None:
        self.shards: list[str] = []
        self.sizes: list[int] = []
        self._spans: list[tuple[int, int, int, int]] = []  # shard, offset, length, label
        self._keys: list[bytes] = []
        self._digests: list[bytes] = []

    def add(self, span: Span, digest: bytes = b"") -> None:
        """Add an image of the shard that :meth:`end_shard` will name next."""
        self._spans.append((len(self.shards), span.offset, span.length, span.label))
        self._keys.append(span.key.encode("utf-8", "replace"))
        if digest:
            self._digests.append(digest)

    def end_shard(self, name: str, size: int) -> None:
        """Name the shard whose images have all been added."""
        self.shards.append(name)
        self.sizes.append(size)

    def build(self) -> ShardIndex:
        """The finished index."""
        columns = np.array(self._spans, dtype=np.int64).reshape(-1, 4)
        return ShardIndex(
            shards=tuple(self.shards),
            sizes=np.array(self.sizes, dtype=np.int64),
            shard=columns[:, 0].astype(np.int32),
            offset=columns[:, 1].copy(),
            length=columns[:, 2].copy(),
            label=columns[:, 3].copy(),
            key_text=np.frombuffer(b"".join(self._keys), dtype=np.uint8),
            key_end=np.cumsum([len(key) for key in self._keys], dtype=np.int64),
            digest=np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, 16),
        )


def short_digest(data: bytes) -> bytes:
    """The first 16 bytes of the SHA-256: enough to notice any damage."""
    return hashlib.sha256(data).digest()[:16]


def tar_member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """A member's header and its padded data, without owner or time, so the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT), data + b"\0" * (-len(data) % BLOCK)


def read_span(path: str | Path, offset: int, length: int) -> bytes:
    """Read ``length`` bytes at ``offset``. The file is opened for each read, which costs microseconds and is safe in
    threads and in forked processes.

    Raises:
        DigitError: the shard is missing or shorter than that.
    """
    try:
        with open(path, "rb", buffering=0) as handle:
            handle.seek(offset)
            data = handle.read(length)
    except FileNotFoundError as error:
        raise DigitError(f"The shard {path} is missing.") from error
    if len(data) != length:
        raise DigitError(f"The shard {path} is truncated: it ends within an image at byte {offset:,}. Copy it again.")
    return data


def scan_shards(paths: Sequence[Path]) -> ShardIndex:
    """Build an index by reading the headers of tar files (and their small label members), not the images.

    Raises:
        DigitError: names the shard: missing, not a plain tar, truncated, or with a label that is not a number.
    """
    builder = IndexBuilder()
    for path in track(paths, "Indexing shards", unit="shards"):
        for span in scan_shard(path):
            builder.add(span)
        builder.end_shard(path.name, path.stat().st_size)
    return builder.build()


def scan_shard(path: Path) -> Iterator[Span]:
    """The images of one tar file, in order."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = (member for member in tar if member.isreg() and not member.issparse())
            for key, sample in groupby(members, key=lambda member: _split_name(member.name)[0]):
                span = _sample_span(tar, key, list(sample), path)
                if span is not None:
                    yield span
            # tarfile takes a file that stops between two members for a whole one
            if tar.offset + 2 * BLOCK > path.stat().st_size:
                raise DigitError(
                    f"The shard {path} is truncated: the end mark of a tar file is missing. Copy it again."
                )
    except FileNotFoundError as error:
        raise DigitError(f"There is no shard {path}.") from error
    except tarfile.TarError as error:
        raise DigitError(
            f"The shard {path} is not a readable plain tar file ({error}); it is truncated, damaged or compressed. "
            "Compressed shards must be unpacked first, for images inside them cannot be read at random."
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _sample_span(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], path: Path) -> Span | None:
    image: tarfile.TarInfo | None = None
    label = NO_LABEL
    for member in members:
        extension = _split_name(member.name)[1]
        if extension in EXTENSIONS:
            image = image or member
        elif extension in ("cls", "json") and member.size <= _MOST_LABEL_BYTES:
            handle = tar.extractfile(member)
            label = _label(handle.read() if handle else b"", extension, label, f"{member.name} in the shard {path}")
    return Span(key, image.offset_data, image.size, label) if image else None


def _label(data: bytes, extension: str, label: int, where: str) -> int:
    try:
        if extension == "cls":
            return int(data)
        fields = json.loads(data)
        found = [fields[name] for name in _LABEL_FIELDS if name in fields] if isinstance(fields, dict) else []
        return int(found[0]) if found else label
    except (ValueError, TypeError) as error:
        raise DigitError(f"The label {where} is not a class id but {data[:40]!r}; expected a whole number.") from error
