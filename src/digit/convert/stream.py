"""Write a component piece by piece: the whole of a checkpoint is never in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from digit.core.config import to_dict
from digit.core.files import sha256_of, write_file, write_folder, write_json

_PIECE = 16 << 20  # bytes copied at a time

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Parts = Mapping[str, Sequence[Tensor]]
"""Our tensor name to slices of foreign tensors; laid end to end along dimension 0 they are our tensor. Nothing is
copied."""


@dataclass(frozen=True)
class Component:
    """A converted component, not yet written.

    Attributes:
        type: name of our class.
        config: its config.
        parts: its tensors.
        provenance: facts to keep with it.
        file: that it comes from; its name and checksum join the provenance.
    """

    type: str
    config: Any
    parts: Parts
    provenance: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None


def write_component(folder: str | Path, component: Component, used: Callable[[int], None] = lambda _: None) -> None:
    """Write what :func:`digit.models.component.save_component` would, whole or not at all, holding only a piece at a
    time.

    Args:
        folder: replaced if it exists.
        component: what to write.
        used: told the bytes of every piece written; see :class:`digit.convert.torchfile.Pages`.
    """
    facts = component.provenance
    if component.file is not None:
        facts = {"source": short_name(component.file), "sha256": sha256_of(component.file), **facts}
    values = {"type": component.type, "config": to_dict(component.config), "provenance": facts}
    with write_folder(folder) as aside:
        write_json(aside / "config.json", values)
        write_parts(aside / "model.safetensors", component.parts, used)


def short_name(file: Path) -> str:
    """A file's name with two folders: the published checkpoints all have the same name, and no more of the path is
    needed.
    """
    return "/".join(file.parts[-3:])


def write_parts(path: str | Path, parts: Parts, used: Callable[[int], None] = lambda _: None) -> None:
    """Write a safetensors file: the length of its header (8 bytes), the header as JSON, then the raw bytes.

    Source: the format's description in huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide types first, so that every tensor starts at a multiple of its item size
    names = sorted(parts, key=lambda name: (-parts[name][0].element_size(), name))
    offset = 0
    for name in names:
        pieces = parts[name]
        shape = list(pieces[0].shape) if len(pieces) == 1 else [sum(p.shape[0] for p in pieces), *pieces[0].shape[1:]]
        size = sum(piece.numel() for piece in pieces) * pieces[0].element_size()
        header[name] = {"dtype": _DTYPES[pieces[0].dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for piece in parts[name]:
                    _write_tensor(handle, piece.to(parts[name][0].dtype), used)

    write_file(path, write)


def _write_tensor(handle: IO[bytes], tensor: Tensor, used: Callable[[int], None]) -> None:
    rows = tensor.detach().reshape(1) if tensor.ndim == 0 else tensor.detach()
    row_bytes = max(1, rows[:1].numel() * rows.element_size())
    step = max(1, _PIECE // row_bytes)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        handle.write(piece.contiguous().view(torch.uint8).numpy().data)
        used(piece.numel() * piece.element_size())
