"""What each cluster looks like: the patches of real images that lie nearest to its centroid.

An atlas is one file beside the codebook, ``codebook/patches.safetensors``. It is opened, not loaded: only the clusters
that are looked at are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import write_tensors
from digit.pipeline.tokenizer import SemanticTokenizer

FILE = "patches.safetensors"
AROUND = 1  # patches of context on each side: a feature sees more than its own cell
MAX_SIDE = 32  # pixels that are stored a patch


class Atlas:
    """Patches by cluster, from a file written by :func:`build_atlas`; a DigitError where there is no such file, it is
    damaged, or it was made for another codebook than the tokenizer's.
    """

    def __init__(self, path: str | Path, tokenizer: SemanticTokenizer) -> None:
        if not Path(path).is_file():
            raise DigitError(f"There is no atlas {path}; make one with: digit atlas MODEL --data D")
        try:
            self._file = cast(Any, safe_open(str(path), framework="np"))
            about = self._file.metadata() or {}
            self.counts: NDArray[np.int64] = self._file.get_tensor("counts")
            self._patches = self._file.get_slice("patches")
        except (SafetensorError, OSError) as error:
            raise DigitError(f"{path} is not a readable atlas ({error}); make it again with: digit atlas") from error
        if about.get("codebook") != _checksum(tokenizer):
            raise DigitError(f"{path} was made for another codebook; make it again with: digit atlas")
        self.images = int(about.get("images", 0))
        self.source = about.get("source", "")

    def patches(self, cluster: int) -> NDArray[np.uint8]:
        """The patches (n, side, side, 3) nearest to a centroid, the nearest first; n is 0 for a cluster without any."""
        found: NDArray[np.uint8] = self._patches[cluster : cluster + 1]
        return found[0, : self.counts[cluster]]


def build_atlas(
    tokenizer: SemanticTokenizer, batches: Iterable[Tensor], path: str | Path, each: int = 8, source: str = ""
) -> NDArray[np.int64]:
    """Find the patches nearest to each centroid, ``each`` a cluster, and write them; (K,) how many each cluster has. A
    DigitError where there are no images, or ``each`` is below 1.

    An image gives a cluster at most one patch, so that eight patches are of eight images. Every patch is stored with
    the ring of patches around it, as at most 32 x 32 pixels. ``batches`` are images (B, 3, S, S) in 0..1, and
    ``source`` is their name, kept in the file.
    """
    if tokenizer.depth > 1:
        raise DigitError("Patches show what a token looks like; several residual tokens stand for one place together.")
    if each < 1:
        raise DigitError(f"{each} patches a cluster were asked for; expected at least 1.")
    clusters, (rows, columns) = tokenizer.vocab_size, tokenizer.grid
    side = min(MAX_SIDE, tokenizer.image_size // rows * (2 * AROUND + 1))
    best = np.full((clusters, each), np.inf, dtype=np.float32)
    kept = np.zeros((clusters, each, side, side, 3), dtype=np.uint8)
    images = 0
    for batch in batches:
        images += len(batch)
        for distance, cluster, image, place in sorted(_candidates(tokenizer, batch)):
            worst = int(best[cluster].argmax())
            if distance < best[cluster, worst]:
                best[cluster, worst] = distance
                kept[cluster, worst] = _cut(batch[image], divmod(place, columns), (rows, columns), side)
    if not images:
        raise DigitError("No images were given; expected at least one.")
    order = best.argsort(axis=1, kind="stable")  # (K, each), the nearest first
    counts: NDArray[np.int64] = np.isfinite(best).sum(1)
    patches = np.take_along_axis(kept, order[..., None, None, None], axis=1)
    about = {"codebook": _checksum(tokenizer), "images": str(images), "source": source}
    write_tensors(path, {"patches": torch.from_numpy(patches), "counts": torch.from_numpy(counts)}, about)
    return counts


@torch.inference_mode()
def _candidates(tokenizer: SemanticTokenizer, batch: Tensor) -> list[tuple[float, int, int, int]]:
    """(squared distance, cluster, image, place) of each image's patch that is nearest to each cluster that it has."""
    features = tokenizer.features(batch).float()  # (B, N, D)
    tokens = tokenizer.codebook.assign(features)  # (B, N)
    distances = (features - tokenizer.codebook.lookup(tokens)).square().sum(-1)  # (B, N)
    nearest: dict[tuple[int, int], tuple[float, int]] = {}
    for image, (row, far) in enumerate(zip(tokens.tolist(), distances.tolist(), strict=True)):
        for place, (cluster, distance) in enumerate(zip(row, far, strict=True)):
            if distance < nearest.get((image, cluster), (float("inf"), 0))[0]:
                nearest[image, cluster] = distance, place
    return [(distance, cluster, image, place) for (image, cluster), (distance, place) in nearest.items()]


def _cut(image: Tensor, cell: tuple[int, int], grid: tuple[int, int], side: int) -> Any:
    """The surroundings (side, side, 3) uint8 of a cell of an image (3, S, S); beyond its edge the edge is repeated."""
    height, width = image.shape[1] // grid[0], image.shape[2] // grid[1]
    margin = (AROUND * width, AROUND * width, AROUND * height, AROUND * height)
    padded = F.pad(image[None], margin, mode="replicate")  # (1, 3, S + 2 height, S + 2 width)
    top, left = cell[0] * image.shape[1] // grid[0], cell[1] * image.shape[2] // grid[1]
    across = 2 * AROUND + 1
    patch = padded[..., top : top + across * height, left : left + across * width]
    if patch.shape[-1] != side:
        patch = F.interpolate(patch, size=(side, side), mode="bilinear", antialias=True)
    return patch[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def _checksum(tokenizer: SemanticTokenizer) -> str:
    values = tokenizer.codebook.centroids.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()
