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


class Moments:
    """Running mean and covariance in float64; memory does not grow with the number of rows.

    A batch's own mean and scatter are merged into the totals (Chan, Golub and LeVeque 1979), which stays exact where
    the difference of two large sums would not.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add rows.

        Args:
            features: (B, D) floats on any device.

        Raises:
            DigitError: a row of another width than before, or NaN or infinity in a row.
        """
        rows = features.detach().to("cpu", torch.float64)
        if self.n == 0:
            width = rows.shape[1]
            self._mean, self._scatter = (
                torch.zeros(width, dtype=rows.dtype),
                torch.zeros(width, width, dtype=rows.dtype),
            )
        if rows.ndim != 2 or rows.shape[1] != len(self._mean):
            raise DigitError(
                f"Features of shape {tuple(rows.shape)} were given; expected rows of width {len(self._mean)}."
            )
        broken = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            raise DigitError(
                f"The features of image {self.n + broken[0]} hold NaN or infinity ({len(broken)} of {len(rows)} images in its "
                "batch). The weights are damaged, or half precision overflowed; measure in float32."
            )
        total = self.n + len(rows)
        mean = rows.mean(dim=0)
        centred, step = rows - mean, mean - self._mean
        self._scatter.addmm_(centred.T, centred)  # (D, D)
        self._scatter.addr_(step, step, alpha=self.n * len(rows) / total)
        self._mean += step * (len(rows) / total)
        self.n = total

    def statistics(self, metadata: dict[str, Any] | None = None) -> FeatureStatistics:
        """The mean and unbiased covariance of all rows so far.

        Raises:
            DigitError: fewer than two rows; a covariance needs two.
        """
        if self.n < 2:
            raise DigitError(
                f"{self.n} image(s) were given; the covariance that FID compares needs at least 2, and 10,000 to be useful."
            )
        return FeatureStatistics(
            self._mean.numpy().copy(), (self._scatter / (self.n - 1)).numpy(), self.n, dict(metadata or {})
        )


class FeatureFile:
    """Feature rows in a temporary file, read back memory-mapped, for the metrics that need every row (KID,
    precision).
    """

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


def save_statistics(path: str | Path, statistics: FeatureStatistics, features: Tensor | None = None) -> Path:
    """Write ``mu``, ``sigma``, ``n`` and ``metadata`` (JSON text) as ``.npz``; tools that look for mu and sigma read it
    too.

    With ``features`` (n, D) float32 the file serves KID, precision and recall as well, and is that much larger.
    """
    arrays = {"mu": statistics.mu, "sigma": statistics.sigma, "metadata": np.array(json.dumps(statistics.metadata))}
    if statistics.n is not None:
        arrays["n"] = np.array(statistics.n)
    if features is not None:
        arrays["features"] = features.numpy()

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            np.savez(handle, **arrays)  # type: ignore[arg-type] # its stub takes allow_pickle for one of the arrays

    return write_file(path, write)


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Read statistics: our layout, or the ADM layout (``mu`` and ``sigma``; its spatial ``mu_s`` and ``sigma_s`` are
    not used).

    Nothing is unpickled.

    Raises:
        DigitError: the file is missing, is another kind of file, or its arrays do not fit each other.
    """
    path = Path(path)
    if not path.is_file():
        raise DigitError(f"There is no statistics file {path}.")
    if not zipfile.is_zipfile(path):
        raise DigitError(f"{path} is not an .npz file; expected the arrays 'mu' and 'sigma' of FID statistics.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = set(arrays.files)
            if not {"mu", "sigma"} <= found:
                raise DigitError(
                    f"{path} holds the arrays {sorted(found)}; expected 'mu' and 'sigma' of FID statistics."
                )
            mu, sigma = np.asarray(arrays["mu"], np.float64), np.asarray(arrays["sigma"], np.float64)
            n = int(arrays["n"]) if "n" in found else None
            metadata = json.loads(str(arrays["metadata"])) if "metadata" in found else {}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DigitError(f"{path} is not a readable .npz file of statistics ({error}).") from error
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise DigitError(f"{path} holds mu {mu.shape} and sigma {sigma.shape}; expected (D,) and (D, D).")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise DigitError(f"{path} holds NaN or infinity; these statistics cannot be used, make them again.")
    return FeatureStatistics(mu, sigma, n, {**metadata, "file": path.name, "file_sha256": sha256_of(path)})


def load_features(path: str | Path) -> Tensor | None:
    """The features (n, D) float32 of every image, where a file of statistics has them.

    Raises:
        DigitError: they do not fit the file's statistics.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if "features" not in arrays.files:
            return None
        try:
            features = arrays["features"]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DigitError(f"The features of {path} cannot be read ({error}).") from error
        width = len(arrays["mu"])
    if (
        features.ndim != 2
        or features.shape[1] != width
        or features.dtype != np.float32
        or not np.isfinite(features).all()
    ):
        raise DigitError(
            f"{path} holds features {features.shape} of {features.dtype}; expected finite ones (n, {width}) of float32."
        )
    return torch.from_numpy(features)
