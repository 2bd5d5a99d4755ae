"""What is sampled before pixels: :class:`Tokens`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paint:
    """What a decoder that goes straight to pixels needs beside the semantic tokens.

    Attributes:
        decoder: its kind.
        noise: (B, noise_dim), made from each picture's number.
        labels: (B,) classes or -1; None for none.
        kept: (B, 3, S, S) a picture in 0..1 of which parts stay as they are, for editing.
        anew: (B, 1, S, S) bool, True where it does not.
    """

    decoder: str
    noise: Tensor
    labels: Tensor | None = None
    kept: Tensor | None = None
    anew: Tensor | None = None

    def take(self, rows: Tensor) -> Paint:
        """Some of the pictures, by row (n,) int64."""
        parts = (self.noise, self.labels, self.kept, self.anew)
        return Paint(self.decoder, *(None if part is None else part[rows.to(part.device)] for part in parts))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Tokens:
    """What is sampled before pixels: integer grids are all that crosses a stage boundary.

    Attributes:
        semantic: (B, N) int64, or None for a baseline in VQ space.
        vq: (B, M) int64, or None where only the prior ran, or where the decoder goes straight to pixels.
        paint: how that decoder makes the pixels.
    """

    semantic: Tensor | None
    vq: Tensor | None
    paint: Paint | None = None

    def __len__(self) -> int:
        """Pictures, B."""
        return next(len(grid) for grid in (self.semantic, self.vq) if grid is not None)

    def take(self, rows: Tensor) -> Tokens:
        """Some of the pictures, by row (n,) int64."""
        semantic, vq = (None if grid is None else grid[rows.to(grid.device)] for grid in (self.semantic, self.vq))
        return Tokens(semantic, vq, None if self.paint is None else self.paint.take(rows))

    def sha256(self) -> str:
        """A checksum of both grids: equal tokens, equal checksum, on any machine."""
        digest = hashlib.sha256()
        for grid in (self.semantic, self.vq):
            digest.update(b"-" if grid is None else grid.cpu().to(torch.int32).contiguous().numpy().tobytes())
        return digest.hexdigest()
