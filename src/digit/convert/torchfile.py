"""Open a foreign torch file: nothing in it is run, nothing is read before it is used, and refusals are sentences.

A torch file is a pickle, and a pickle can carry code. It is read with ``weights_only=True``. Training checkpoints also
hold settings objects (argparse, OmegaConf) and NumPy scalars; for those, and nothing else, there are stand-in classes
here that only keep what they are given, so neither those packages nor their code take part.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import pickletools
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from digit.core.errors import DigitError


class Held:
    """Stands for a foreign object: keeps its arguments and its state, and does nothing."""

    path = ""

    def __new__(cls, *args: Any) -> Held:
        """Keep the arguments."""
        held = super().__new__(cls)
        held.args = args
        held.state = None
        return held

    args: tuple[Any, ...]
    state: Any

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def _stand_in(path: str) -> type[Held]:
    module, name = path.rsplit(".", 1)
    # torch finds an allowed class by these two
    return type(name, (Held,), {"path": path, "__module__": module, "__qualname__": name})


_NODES = "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode PathNode StringNode"
_STAND_INS = [
    _stand_in(path)
    for path in [
        "argparse.Namespace",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.nodes.UnionNode",
        *(f"omegaconf.nodes.{name}" for name in _NODES.split()),
        *(f"typing.{name}" for name in ("Any", "Dict", "List", "Tuple")),
        *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")),
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    ]
]


def _plain_dict(*_: Any) -> dict[Any, Any]:
    # for collections.defaultdict: the reader fills dicts, and no other kind
    return {}


_plain_dict.__module__, _plain_dict.__qualname__ = "collections", "defaultdict"


def plain(value: Any) -> Any:
    """Settings as Python's own dicts, lists and scalars; what is none of these stays as it is.

    Args:
        value: anything out of :func:`read_torch_file`.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, Held):
        return value
    if value.path.endswith("multiarray.scalar"):
        return _numpy_scalar(value)
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if isinstance(state, dict):
        if value.path == "argparse.Namespace":
            return plain(state)
        for content in ("_content", "_val"):  # OmegaConf's containers and leaves
            if content in state:
                return plain(state[content])
    return value


def _numpy_scalar(value: Held) -> Any:
    codes = {
        "f8": "d",
        "f4": "f",
        "f2": "e",
        "i8": "q",
        "i4": "i",
        "i2": "h",
        "i1": "b",
        "u8": "Q",
        "u4": "I",
        "u1": "B",
        "b1": "?",
    }
    dtype, *data = value.args
    code = codes.get(dtype.args[0]) if isinstance(dtype, Held) and dtype.args else None
    if code is None or not data or not isinstance(data[0], bytes):
        return value
    big = isinstance(dtype.state, tuple) and ">" in dtype.state
    return struct.unpack((">" if big else "<") + code, data[0])[0]


def read_torch_file(path: str | Path) -> Any:
    """Everything in a torch file; tensors of a modern (zip) one stay on disk until they are touched.

    Raises:
        DigitError: no such file, truncated, another kind of file, or a pickle that asks for code; the message names the
            file and the reason.
    """
    path = Path(path)
    is_zip = _check_kind(path)
    try:
        with torch.serialization.safe_globals([*_STAND_INS, _plain_dict]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise, the user gets one sentence
        asked = [name for name in _globals_in(path, is_zip) if not _is_allowed(name)]
        if asked:
            raise DigitError(
                f"{path} is refused: its pickle asks to run or build {', '.join(asked[:4])}, which is code and not weights. "
                "digit loads tensors and plain settings only. If you trust the file, open it where it was made and save its "
                "state dict alone with torch.save."
            ) from error
        raise DigitError(
            f"{path} cannot be read as a torch file: it is damaged or half copied ({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    if text and text[0].startswith("Unsupported operand"):
        return "or it is written in a pickle protocol other than 2; save it again with torch.save"
    return (text[0] if text else type(error).__name__)[:200]


def _is_allowed(name: str) -> bool:
    from torch import _weights_only_unpickler as unpickler  # only to word the refusal; torch itself decides

    return (
        name in unpickler._get_allowed_globals()
        or name == "collections.defaultdict"
        or any(name == item.path for item in _STAND_INS)
    )


def _check_kind(path: Path) -> bool:
    """True for a zip (modern torch file), False for a bare pickle (before torch 1.6); anything else is an error."""
    if path.is_dir():
        raise DigitError(f"{path} is a folder; a checkpoint file was expected.")
    if not path.is_file():
        raise DigitError(f"There is no file {path}.")
    with open(path, "rb") as handle:
        head = handle.read(512)
    text = head.lstrip().lower()
    kinds = {
        "is empty": not head,
        "is a git-LFS pointer, not the file itself; fetch it with `git lfs pull` or download it": text.startswith(
            b"version https://git-lfs"
        ),
        "is a web page; the download link led to a page and not to the file": text.startswith(
            (b"<!doctype", b"<html", b"<?xml")
        ),
        "is a NumPy array; a codebook (km_*.npy) is given as --codebook": head.startswith(b"\x93NUMPY"),
        "is compressed; unpack it first": head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")),
        "is a tar archive; unpack it first": head[257:262] == b"ustar",
        "is a safetensors file; a torch checkpoint was expected": head[8:9] == b"{" and b'"dtype"' in head,
        "is text; a torch checkpoint was expected": bool(text) and text.isascii() and min(text) >= 9,
    }
    for sentence, applies in kinds.items():
        if applies:
            raise DigitError(f"{path} {sentence}.")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise DigitError(f"{path} is truncated: the end of the file is missing. Download or copy it again.")
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise DigitError(f"{path} is a zip archive, but not a torch checkpoint: it holds no data.pkl.")
        return True
    if not head.startswith(b"\x80"):
        raise DigitError(f"{path} is not a torch checkpoint: it starts with the bytes {head[:8].hex(' ')}.")
    return False


def _globals_in(path: Path, is_zip: bool) -> list[str]:
    """The classes and functions that a file's pickle names, without running it."""
    names: dict[str, None] = {}
    with suppress(Exception):  # the file is broken already; what was found until then is what can be said
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(name) as handle:
                    names.update(dict.fromkeys(_scan(handle)))
        else:
            with open(path, "rb") as handle:
                while True:
                    names.update(dict.fromkeys(_scan(handle)))
    return list(names)


def _scan(handle: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for code, value, _ in pickletools.genops(handle):
        if code.name in ("GLOBAL", "INST"):
            module, name = str(value).split(" ", 1)
            module, name = pickle._compat_pickle.NAME_MAPPING.get((module, name), (module, name))  # type: ignore[attr-defined]
            module = pickle._compat_pickle.IMPORT_MAPPING.get(module, module)  # type: ignore[attr-defined]
            yield f"{module}.{name}"
        elif code.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(value, str):
            strings.append(value)


class Pages:
    """The memory of mapped files, given back while they are walked through; else all of a checkpoint would end up in
    memory.

    Given-back pages are read again when touched. On other systems than Linux nothing happens.
    """

    _EVERY = 64 << 20

    def __init__(self, *paths: Path) -> None:
        """Remember the files.

        Args:
            paths: files opened by :func:`read_torch_file`.
        """
        self._names = {str(path.resolve()) for path in paths}
        self._used = 0

    def used(self, count: int) -> None:
        """Say that ``count`` more bytes were read; now and then the memory is given back."""
        self._used += count
        if self._used >= self._EVERY and sys.platform.startswith("linux"):
            self._used = 0
            self._release()

    def _release(self) -> None:
        with open("/proc/self/maps", encoding="utf-8") as handle:
            mapped = [line.split(maxsplit=5) for line in handle]
        libc = ctypes.CDLL(None)
        for fields in mapped:
            if len(fields) == 6 and fields[5].rstrip("\n") in self._names:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
