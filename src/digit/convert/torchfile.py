"""Open a foreign torch file: nothing in it is run, nothing is read before it is used, and refusals are sentences.

A torch file is a pickle, and a pickle can carry code. It is read with ``weights_only=True``. Training checkpoints also
hold settings (argparse, OmegaConf) and NumPy scalars; for those, and nothing else, there are stub classes here that
only keep what they are given, so neither those packages nor their code take part.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit.core.errors import DigitError


class Stub:
    """A foreign object: keeps its arguments and its state, and does nothing."""

    path = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Stub:
        """Keep the arguments."""
        stub = super().__new__(cls)
        stub.args, stub.state = args, None
        return stub

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


_PATHS = [
    "argparse.Namespace",
    *(f"numpy.{name}" for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.UnionNode")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(
        f"omegaconf.nodes.{name}Node"
        for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Tuple")),
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")),
]
_STUBS: list[Any] = [(type(path.rpartition(".")[2], (Stub,), {"path": path}), path) for path in _PATHS]
_STUBS.append((lambda *_: {}, "collections.defaultdict"))  # the reader fills dicts, and no other kind


def plain(value: Any) -> Any:
    """Settings out of :func:`read_torch_file` as Python's own dicts, lists and scalars; the rest stays as it is."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if not isinstance(value, Stub):
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


def _numpy_scalar(value: Stub) -> Any:
    """The number in it; what is no number, such as an object, stays as it is."""
    dtype, *data = value.args
    code = dtype.args[0] if isinstance(dtype, Stub) and dtype.args else ""
    if not re.fullmatch(r"[fiu][1248]|b1", str(code)) or not data or not isinstance(data[0], bytes):
        return value
    big = isinstance(dtype.state, tuple) and ">" in dtype.state
    return np.frombuffer(data[0], (">" if big else "<") + code)[0].item()


def read_torch_file(path: str | Path) -> Any:
    """Everything in a torch file; tensors of a modern (zip) one stay on disk until they are touched. DigitError: no
    such file, truncated, another kind of file, or a pickle that asks for code; the message names the file and the
    reason.
    """
    path = Path(path)
    is_zip = _check_kind(path)
    with torch.serialization.safe_globals(_STUBS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # whatever a damaged or hostile file makes torch raise, the user gets one sentence
            asked = re.findall(r"GLOBAL (\w[\w.]*)", str(error))[:1]
            with suppress(Exception):  # it reads zip files of pickle protocol 2 only
                asked = torch.serialization.get_unsafe_globals_in_checkpoint(path) or asked
            if asked:
                raise DigitError(
                    f"{path} is refused: its pickle asks to run or build {', '.join(sorted(asked)[:4])}, which is code "
                    "and not weights. digit loads tensors and plain settings only. If you trust the file, open it "
                    "where it was made and save its state dict alone with torch.save."
                ) from error
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
            reason = reason.splitlines()[0]
            if reason.startswith("Unsupported operand"):
                reason = "or it is written in a pickle protocol other than 2; save it again with torch.save"
            raise DigitError(
                f"{path} cannot be read as a torch file: it is damaged or half copied ({reason[:200]})."
            ) from error


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
