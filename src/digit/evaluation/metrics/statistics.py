"""Mean and covariance of image features, gathered batch by batch and kept as ``.npz`` files."""

from __future__ import annotations

import json
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import sha256_of, write_file

_INT16 = 32767


@dataclass(frozen=True)
class FeatureStatistics:
    """What FID needs to know of a set of images.

    Attributes:
        mu: (D,) float64, the mean feature.
        sigma: (D, D) float64, the unbiased covariance.
        n: how many images; None where the file does not say, as in the ADM layout.
        metadata: tool, version, weights' checksum, preprocessing and source, as far as they are known.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureSet:
    """One side of a comparison.

    Attributes:
        name: what the user calls it.
        statistics: for FID.
        features: (n, 2048) float32, where they were kept.
        logits: (n, 1008) float32, where they were kept and the weights have a classifier.
        spatial: for sFID, where it was asked for.
        seconds: what the network took, reading included; 0 for saved statistics.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    logits: Tensor | None = None
    spatial: FeatureStatistics | None = None
    seconds: float = 0.0


class Moments:
    """Running mean and covariance in float64, about the mean of the first rows: exact far from zero too. Memory does
    not grow with the number of rows.
    """

    def __init__(self) -> None:
        self.n = 0
        self._origin = self._sum = torch.zeros(0, dtype=torch.float64)
        self._products = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add rows (B, D), floats on any device.

        Raises:
            DigitError: a row of another width than before, or NaN or infinity in a row.
        """
        rows = features.detach().to("cpu", torch.float64)
        width = len(self._origin) if self.n else features.shape[-1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise DigitError(f"Features of shape {tuple(rows.shape)} were given; expected rows of width {width}.")
        broken = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            raise DigitError(
                f"The features of image {self.n + broken[0]} hold NaN or infinity ({len(broken)} of {len(rows)} images "
                "in its batch). The weights are damaged, or half precision overflowed; measure in float32."
            )
        if self.n == 0:
            self._origin, self._sum = rows.mean(0), rows.new_zeros(width)
            self._products = rows.new_zeros(width, width)
        centred = rows - self._origin
        self._sum += centred.sum(0)
        self._products.addmm_(centred.T, centred)  # (D, D)
        self.n += len(rows)

    def statistics(self, metadata: dict[str, Any] | None = None) -> FeatureStatistics:
        """The mean and unbiased covariance of all rows so far.

        Raises:
            DigitError: fewer than two rows; a covariance needs two.
        """
        if self.n < 2:
            raise DigitError(
                f"{self.n} image(s) were given; the covariance that FID compares needs at least 2, and 10,000 to be "
                "useful."
            )
        mean = self._sum / self.n
        sigma = (self._products - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return FeatureStatistics((self._origin + mean).numpy(), sigma.numpy(), self.n, dict(metadata or {}))


class FeatureFile:
    """Feature rows in a temporary file, read back memory-mapped, for metrics that need every row (KID, precision)."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._width = 0
        self.n = 0

    def append(self, rows: Tensor) -> None:
        """Add (B, D) rows; they are kept as float32."""
        self._width = rows.shape[1]
        self._file.write(rows.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        self.n += len(rows)

    def read(self) -> Tensor:
        """All rows, (n, D) float32, backed by the file."""
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, dtype=np.float32, mode="r+", shape=(self.n, self._width)))


def save_statistics(
    path: str | Path,
    statistics: FeatureStatistics,
    features: Tensor | None = None,
    spatial: FeatureStatistics | None = None,
    compact: bool = False,
) -> Path:
    """Write ``mu``, ``sigma``, ``n`` and ``metadata`` (JSON text) as ``.npz``; tools that look for mu and sigma read it
    too.

    Args:
        features: (n, D) float32; with them the file serves KID, precision and recall as well, and is that much larger.
        spatial: for sFID, as ``mu_s`` and ``sigma_s`` of the ADM layout.
        compact: in place of ``sigma`` write ``deviation`` (D,) float32 and ``correlation``, its upper triangle in steps
            of 1 / 32767: 4 MB for 34; FID of CIFAR-10 changes by less than 1e-4.
    """
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "metadata": np.array(json.dumps(statistics.metadata))}
    if compact:
        sigma = arrays.pop("sigma")
        deviation = np.sqrt(sigma.diagonal())
        correlation = (sigma / np.outer(deviation, deviation))[np.triu_indices(len(sigma), 1)]
        arrays |= {"mu": statistics.mu.astype(np.float32), "deviation": deviation.astype(np.float32)}
        arrays["correlation"] = np.rint(correlation * _INT16).astype(np.int16)
    if statistics.n is not None:
        arrays["n"] = np.array(statistics.n)
    if features is not None:
        arrays["features"] = features.numpy()
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu, "sigma_s": spatial.sigma}

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            (np.savez_compressed if compact else np.savez)(handle, **arrays)  # type: ignore[arg-type]

    return write_file(path, write)


def load_set(path: str | Path, features: bool = False) -> FeatureSet:
    """Read statistics: our layout, or the ADM layout (``mu``, ``sigma``, ``mu_s``, ``sigma_s``). Nothing is unpickled.

    Args:
        features: also read the features of every image, where the file has them.

    Raises:
        DigitError: the file is missing, is another kind of file, or its arrays do not fit each other.
    """
    path = Path(path)
    found = npz_arrays(path)
    if "mu" not in found or not {"sigma", "correlation"} & found:
        raise DigitError(f"{path} holds the arrays {sorted(found)}; expected 'mu' and 'sigma' of FID statistics.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            n = int(arrays["n"]) if "n" in found else None
            metadata = json.loads(str(arrays["metadata"])) if "metadata" in found else {}
            about = {**metadata, "file": path.name, "file_sha256": sha256_of(path)}
            if "sigma" in found:
                sigma = arrays["sigma"]
            else:  # of what `compact` wrote
                deviation = arrays["deviation"]
                half = np.zeros((len(deviation), len(deviation)))
                half[np.triu_indices(len(half), 1)] = arrays["correlation"] / _INT16
                sigma = (half + half.T + np.eye(len(half))) * np.outer(deviation, deviation.astype(np.float64))
            whole = _checked(path, arrays["mu"], sigma, n, about)
            spatial = _checked(path, arrays["mu_s"], arrays["sigma_s"], n, about) if "mu_s" in found else None
            rows = arrays["features"] if features and "features" in found else None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DigitError(f"{path} is not a readable .npz file of statistics ({error}).") from error
    width = len(whole.mu)
    if rows is not None and (
        rows.ndim != 2 or rows.shape[1] != width or rows.dtype != np.float32 or not np.isfinite(rows).all()
    ):
        raise DigitError(
            f"{path} holds features {rows.shape} of {rows.dtype}; expected finite ones (n, {width}) of float32."
        )
    return FeatureSet(path.name, whole, None if rows is None else torch.from_numpy(rows), spatial=spatial)


def npz_arrays(path: str | Path) -> set[str]:
    """The names of the arrays in a ``.npz`` file.

    Raises:
        DigitError: no such file, or another kind of file.
    """
    if not Path(path).is_file():
        raise DigitError(f"There is no statistics file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise DigitError(
            f"{path} is not an .npz file; expected statistics ('mu', 'sigma') or images ('arr_0')."
        ) from error


def _checked(path: Path, mu: Any, sigma: Any, n: int | None, metadata: dict[str, Any]) -> FeatureStatistics:
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DigitError(f"{path} holds mu {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D).")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DigitError(f"{path} holds NaN or infinity; these statistics cannot be used, make them again.")
    return FeatureStatistics(mu, sigma, n, metadata)
