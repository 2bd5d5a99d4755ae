"""Write a component piece by piece: the whole of a checkpoint is never in memory."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.convert.keys import Parts
from digit.core.config import to_dict
from digit.core.files import sha256_of, write_file, write_folder, write_json

_PIECE = 16 << 20  # bytes copied at a time
_MADV_PAGEOUT = 21  # of Linux; Python's mmap has no name for it
_DTYPES = {torch.bool: "BOOL", torch.bfloat16: "BF16"}  # the others' names are made of kind and bits


@dataclass(frozen=True)
class Component:
    """A converted component of one of our classes, not yet written; name and checksum of the file that it comes from
    join the provenance.
    """

    type: str
    config: Any
    parts: Parts
    provenance: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None


def write_component(folder: str | Path, component: Component) -> None:
    """Write what :func:`digit.models.component.save_component` would, whole or not at all, holding only a piece at a
    time. The folder is replaced if it exists.
    """
    facts = component.provenance
    if component.file is not None:
        facts = {"source": short_name(component.file), "sha256": sha256_of(component.file), **facts}
    values = {"type": component.type, "config": to_dict(component.config), "provenance": facts}
    with write_folder(folder) as aside:
        write_json(aside / "config.json", values)
        write_parts(aside / "model.safetensors", component.parts)


def short_name(file: Path) -> str:
    """A file's name with two folders: the published checkpoints all have the same name, and no more of the path is
    needed.
    """
    return "/".join(file.parts[-3:])


def write_parts(path: str | Path, parts: Parts) -> None:
    """Write a safetensors file: the length of its header (8 bytes), the header as JSON, then the raw bytes.

    Source: the format's description in huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide types first, so that every tensor starts at a multiple of its item size
    names = sorted(parts, key=lambda name: (-parts[name][0].element_size(), name))
    offset = 0
    for name in names:
        first, *others = parts[name]
        shape = [first.shape[0] + sum(len(p) for p in others), *first.shape[1:]] if first.ndim else []
        size = sum(piece.numel() for piece in parts[name]) * first.element_size()
        kind = "F" if first.is_floating_point() else "I" if first.dtype.is_signed else "U"
        dtype = _DTYPES.get(first.dtype, f"{kind}{8 * first.element_size()}")
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for part in parts[name]:
                    rows = part.detach().to(parts[name][0].dtype).reshape(part.shape or (1,))
                    count = max(1, _PIECE // max(1, rows[:1].nbytes))
                    for piece in torch.split(rows, count):
                        handle.write(piece.contiguous().view(torch.uint8).numpy().data)
                        release(piece)

    write_file(path, write)


def release(tensor: Tensor) -> None:
    """Let the system have the memory of a tensor that was read and is not needed soon: else all of a mapped checkpoint
    would end up in memory. Nothing is lost; what is touched again is read again. On other systems nothing happens.
    """
    if sys.platform.startswith("linux") and tensor.nbytes and tensor.is_contiguous():
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)
