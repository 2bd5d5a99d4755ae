"""Tar shards in the WebDataset convention, with an index that makes every image one read away.

A shard is a plain tar file; a sample is a run of members with one key, the name up to the first dot of its last part:
``KEY.png`` or ``KEY.jpg``, and ``KEY.cls`` (the class id as text) or ``KEY.json`` (with a field ``label``). The index
holds where each image lies, so shards can be streamed in order or read at random. Names in archives are keys; they are
never used as paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from digit.core.errors import DigitError
from digit.core.files import write_bytes
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
    digest: bytes = b""


@dataclass
class Shard:
    """A tar file and the images in it."""

    name: str
    size: int = 0
    spans: list[Span] = field(default_factory=list)


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

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> ShardIndex:
        """The index of these shards."""
        spans = [span for shard in shards for span in shard.spans]
        keys = [span.key.encode("utf-8", "replace") for span in spans]
        column = np.array([span[1:4] for span in spans], dtype=np.int64).reshape(-1, 3)
        counts = np.array([len(shard.spans) for shard in shards], dtype=np.int64)
        return cls(
            shards=tuple(shard.name for shard in shards),
            sizes=np.array([shard.size for shard in shards], dtype=np.int64),
            shard=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            offset=column[:, 0].copy(),
            length=column[:, 1].copy(),
            label=column[:, 2].copy(),
            key_text=np.frombuffer(b"".join(keys), dtype=np.uint8),
            key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
            digest=np.frombuffer(b"".join(span.digest for span in spans), dtype=np.uint8).reshape(-1, 16),
        )

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, i: int) -> str:
        """The key of image ``i``."""
        start = int(self.key_end[i - 1]) if i else 0
        return self.key_text[start : int(self.key_end[i])].tobytes().decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """SHA-256 over keys, labels, lengths and digests in order: the same images in other shards give the same."""
        digest = hashlib.sha256()
        for array in (self.key_text, self.key_end, self.label, self.length, self.digest):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write as NPZ."""
        buffer = io.BytesIO()
        shards = np.frombuffer(json.dumps(self.shards).encode(), dtype=np.uint8)
        np.savez_compressed(buffer, **{**vars(self), "shards": shards})
        return write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> ShardIndex:
        """Read what :meth:`save` wrote; a DigitError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                values: dict[str, Any] = {name: arrays[name] for name in cls.__dataclass_fields__}
            values["shards"] = tuple(json.loads(values["shards"].tobytes()))
        except FileNotFoundError as error:
            raise DigitError(f"There is no index {path}; the dataset folder is incomplete.") from error
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DigitError(f"The index {path} is damaged ({error}); build or copy the dataset again.") from error
        return cls(**values)


def short_digest(data: bytes) -> bytes:
    """The first 16 bytes of the SHA-256: enough to notice any damage."""
    return hashlib.sha256(data).digest()[:16]


def tar_member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """A member's header and its padded data, without owner or time, so the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT), data + b"\0" * (-len(data) % BLOCK)


def scan_shards(paths: Sequence[Path]) -> ShardIndex:
    """An index of the headers and labels of tar files; a DigitError names a shard that is missing or damaged."""
    tracked = track(paths, "Indexing shards", unit="shards")
    return ShardIndex.of([Shard(path.name, path.stat().st_size, list(scan_shard(path))) for path in tracked])


def scan_shard(path: Path) -> Iterator[Span]:
    """The images of one tar file, in order."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = (member for member in tar if member.isreg() and not member.issparse())
            for key, sample in groupby(members, key=lambda member: _split_name(member.name)[0]):
                yield from _sample_span(tar, key, list(sample), path)
            # tarfile takes a file that stops between two members for a whole one
            if tar.offset + 2 * BLOCK > path.stat().st_size:
                raise DigitError(
                    f"The shard {path} is truncated: the end mark of a tar file is missing. Copy it again."
                )
    except tarfile.TarError as error:
        raise DigitError(
            f"The shard {path} is not a readable plain tar file ({error}); it is truncated, damaged or compressed. "
            "Compressed shards must be unpacked first, for images inside them cannot be read at random."
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _sample_span(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo], path: Path) -> Iterator[Span]:
    image, label = None, NO_LABEL
    for member in members:
        extension = _split_name(member.name)[1]
        if extension in EXTENSIONS:
            image = image or member
        elif extension in ("cls", "json") and member.size <= _MOST_LABEL_BYTES:
            handle = tar.extractfile(member)
            label = _label(handle.read() if handle else b"", extension, label, f"{member.name} in the shard {path}")
    if image:
        yield Span(key, image.offset_data, image.size, label)


def _label(data: bytes, extension: str, label: int, where: str) -> int:
    try:
        if extension == "cls":
            return int(data)
        fields = json.loads(data)
        found = [fields[name] for name in _LABEL_FIELDS if name in fields] if isinstance(fields, dict) else []
        return int(found[0]) if found else label
    except (ValueError, TypeError) as error:
        raise DigitError(f"The label {where} is not a class id but {data[:40]!r}; expected a whole number.") from error
