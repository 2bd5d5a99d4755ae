"""Files that appear whole or not at all: everything is written aside, flushed, and renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from digit.core.errors import DigitError

if TYPE_CHECKING:  # the command line writes JSON without waiting for torch
    import torch


def cache_folder() -> Path:
    """Where downloads, indices and built code are kept: ``$DIGIT_CACHE``, else ``digit`` in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DIGIT_CACHE") or home / "digit")


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another --out",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another --out",
    errno.EACCES: "permission was denied; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.ENOENT: "no folder can be made there; choose another --out",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
}


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into sentences that name the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise DigitError(f"Cannot write {path}: {_REASONS[error.errno]}.") from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def write_file(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Create or replace ``path`` in one step: ``write`` fills a temporary file beside it, which is then renamed.

    Raises:
        DigitError: the disk is full, read-only, or the folder may not be written.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        try:
            write(aside)
            with open(aside, "rb") as handle:
                os.fsync(handle.fileno())
            aside.replace(path)
        except SafetensorError as error:
            # safetensors reports the system's refusal as text
            if "os error 28" in str(error) or "No space left" in str(error):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
        finally:
            aside.unlink(missing_ok=True)
    return path


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Fill a new folder aside; in the end, if there was no error, it takes the place of ``path`` in one step."""
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(path)
        aside.mkdir()
        try:
            yield aside
            old = _aside(path) if path.exists() else None
            if old is not None:
                path.rename(old)
            aside.rename(path)
            if old is not None:
                shutil.rmtree(old)
        finally:
            if aside.exists():
                shutil.rmtree(aside)


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write ``data`` whole or not at all."""
    return write_file(path, lambda aside: aside.write_bytes(data))


def write_json(path: str | Path, value: object) -> Path:
    """Write ``value`` as indented JSON, whole or not at all."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a DigitError where it is missing or is not JSON names it and the line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DigitError(f"There is no file {path}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DigitError(f"{path} is not valid JSON ({error}); it may be damaged or half copied.") from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Write named tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_file(path, lambda aside: save_file(ready, str(aside), metadata=metadata))


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors file; a DigitError where it is missing, truncated, or another kind of file."""
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"There is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DigitError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated or another format."
        ) from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
