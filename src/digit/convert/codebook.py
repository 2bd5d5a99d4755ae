"""A codebook on its own: the k-means centroids that the authors keep as ``km_*.npy``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from digit.convert.stream import Component
from digit.core.errors import DigitError
from digit.models.codebook import CodebookConfig


def read_centroids(path: str | Path) -> Tensor:
    """Centroids (K, D) float32 of a ``.npy`` file; K is what the file has, whatever its name says.

    Raises:
        DigitError: no such file, not an array of this shape, truncated, or one that carries Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"There is no codebook file {path}.")
    with open(path, "rb") as handle:
        if handle.read(6) != b"\x93NUMPY":
            raise DigitError(
                f"{path} is not a NumPy array (.npy); a codebook of k-means centroids (K, D) was expected."
            )
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DigitError(
            f"{path} cannot be read as a codebook: it is truncated or holds Python objects ({error})."
        ) from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating):
        raise DigitError(
            f"{path} holds {values.dtype} of shape {values.shape}; expected centroids (K, D) in floating point."
        )
    return torch.from_numpy(values.astype(np.float32))


def codebook_component(centroids: Tensor, half_precision: bool, file: Path) -> Component:
    """The authors' centroids (K, D) as a codebook."""
    clusters, dim = centroids.shape
    config = CodebookConfig(clusters=clusters, dim=dim, half_precision=half_precision, positions="dinov2-offset")
    return Component("Codebook", config, {"centroids": [centroids]}, file=file)
