"""What is sampled before pixels: :class:`Tokens`, and their files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import write_file


@dataclass(frozen=True)
class PixelLatents:
    """What a feed-forward decoder of a kind needs beside semantic tokens to make pixels: noise (B, noise_dim), made
    from each image's number; and for editing, images ``kept`` (B, 3, S, S) in 0..1 and where to make them ``anew``
    (B, 1, S, S) bool.
    """

    decoder: str
    noise: Tensor
    kept: Tensor | None = None
    anew: Tensor | None = None


@dataclass(frozen=True)
class Tokens:
    """What is sampled before pixels: integer grids are all that crosses a stage boundary.

    Attributes:
        semantic: (B, N) int64, or None for a baseline in VQ space.
        vq: (B, M) int64, or None where only the prior ran, or where the decoder makes pixels itself.
        latents: how such a decoder makes them.
        labels: (B,) int64 classes, -1 for none; None where no image has one.
    """

    semantic: Tensor | None = None
    vq: Tensor | None = None
    latents: PixelLatents | None = None
    labels: Tensor | None = None

    @classmethod
    def of(cls, grids: Mapping[str, Tensor], labels: Tensor | None = None) -> Tokens:
        """Tokens of the grids "semantic", "vq", or both."""
        return cls(grids.get("semantic"), grids.get("vq"), labels=labels)

    def __len__(self) -> int:
        """Images, B."""
        return next(len(grid) for grid in (self.semantic, self.vq) if grid is not None)

    def take(self, rows: Tensor) -> Tokens:
        """Some of the images, by row (n,) int64."""

        def of(holder: Any) -> Any:
            parts = {name: part for name, part in vars(holder).items() if isinstance(part, Tensor)}
            return replace(holder, **{name: part[rows.to(part.device)] for name, part in parts.items()})

        some: Tokens = replace(of(self), latents=self.latents and of(self.latents))
        return some

    def sha256(self) -> str:
        """A checksum of what decides the pixels: both grids, and where a decoder makes pixels itself its noise and the
        labels. The same on any machine.
        """
        digest = hashlib.sha256()
        grids = [self.semantic, self.vq]
        for grid in grids if self.latents is None else [*grids, self.labels]:
            digest.update(b"-" if grid is None else grid.cpu().to(torch.int32).contiguous().numpy().tobytes())
        if self.latents is not None:
            digest.update(self.latents.noise.cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def write_arrays(path: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Write tensors as a compressed ``.npz``, integers as int32, whole or not at all."""
    plain = {name: part.cpu() for name, part in tensors.items() if part is not None}
    arrays = {name: (part if part.is_floating_point() else part.int()).numpy() for name, part in plain.items()}

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]

    return write_file(path, write)


def save_tokens_file(path: str | Path, tokens: Tokens) -> Path:
    """Write a ``.npz`` of plain integer arrays: ``semantic``, ``vq``, ``labels``, as far as they are there."""
    return write_arrays(Path(path), {"semantic": tokens.semantic, "vq": tokens.vq, "labels": tokens.labels})


def load_tokens_file(path: str | Path) -> Tokens:
    """Read what :func:`save_tokens_file` wrote. DigitError: no such file, or not integer grids."""
    if not Path(path).is_file():
        raise DigitError(f"There is no token file {path}.")
    names = ("semantic", "vq", "labels")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            grids = {n: torch.from_numpy(arrays[n].astype(np.int64)) for n in names if n in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:  # numpy's own text advises to unpickle
        raise DigitError(
            f"{path} is not a token file: expected the .npz of integer grids that digit tokenize writes."
        ) from error
    if not grids.keys() & {"semantic", "vq"}:
        raise DigitError(f"{path} holds neither 'semantic' nor 'vq' tokens.")
    return Tokens.of(grids, grids.get("labels"))
