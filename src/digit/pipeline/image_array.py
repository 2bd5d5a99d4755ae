"""Images as one array: an ``.npz`` with one ``arr_0`` (n, H, W, 3) uint8, the layout of guided-diffusion's evaluator.

It is written and read image by image, so 50,000 images of 256 x 256 (10 GB) need the memory of a batch. What is known
of the images (how they were sampled) stands in the comment of the zip archive, which other readers do not look at.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import write_file

MEMBER = "arr_0.npy"


def write_image_array(
    path: str | Path, images: Iterable[NDArray[np.uint8]], count: int, about: Mapping[str, Any] | None = None
) -> Path:
    """Write ``count`` images (H, W, 3) of one size, whole or not at all. DigitError: images of different sizes, none,
    or a full disk.
    """

    def write(aside: Path) -> None:
        given, shape = iter(images), None
        with zipfile.ZipFile(aside, "w") as archive:
            archive.comment = json.dumps(dict(about or {})).encode()
            with archive.open(MEMBER, "w", force_zip64=True) as member:
                for number, image in enumerate(given):
                    if shape is None:
                        shape = image.shape
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                        np.lib.format.write_array_header_1_0(member, header)
                    if image.shape != shape:
                        raise DigitError(f"Image {number} is {image.shape}, the first is {shape}; expected one size.")
                    member.write(np.ascontiguousarray(image, np.uint8).tobytes())
        if shape is None:
            raise DigitError("No images were given; expected at least one.")

    return write_file(path, write)


class ImageArray:
    """Such a file, opened for reading: its ``shape`` (n, H, W, 3), and ``about``, what the writer noted. Nothing is
    unpickled. DigitError: no such file, no such array, or an array of something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive, archive.open(MEMBER) as member:
                self.shape = self._header(member)
                comment = archive.comment
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise DigitError(f"{path} is not an .npz file with the array 'arr_0' ({error}).") from error
        try:
            self.about: dict[str, Any] = dict(json.loads(comment or b"{}"))
        except (ValueError, TypeError):  # somebody else's comment
            self.about = {}

    def _header(self, member: IO[bytes]) -> tuple[int, ...]:
        try:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(member)
        except ValueError as error:
            raise DigitError(f"The array arr_0 of {self.path} cannot be read ({error}).") from error
        if dtype != np.uint8 or by_column or len(shape) != 4 or shape[3] != 3:
            raise DigitError(f"{self.path} holds arr_0 {shape} of {dtype}; expected images (n, H, W, 3) of uint8.")
        return tuple(shape)

    def __len__(self) -> int:
        """Images, n."""
        return self.shape[0]

    def batches(self, size: int) -> Iterator[Tensor]:
        """(B, 3, H, W) uint8, in order, with one batch in memory. DigitError: the file ends early."""
        each = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(MEMBER) as member:
            self._header(member)
            for begin in range(0, len(self), size):
                count = min(size, len(self) - begin)
                try:
                    data = bytearray(member.read(count * each))
                except (EOFError, zipfile.BadZipFile) as error:
                    raise DigitError(f"{self.path} is damaged ({error}).") from error
                if len(data) != count * each:
                    raise DigitError(f"{self.path} ends within image {begin + len(data) // each} of {len(self)}.")
                images = torch.frombuffer(data, dtype=torch.uint8).view(count, *self.shape[1:])
                yield images.permute(0, 3, 1, 2).contiguous()
