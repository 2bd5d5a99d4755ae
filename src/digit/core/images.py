"""Images in and out: any file to 8-bit RGB, RGB to tensors in 0..1, and back without a change.

Colour profiles are not applied: the stored numbers are taken as sRGB, as every published ImageNet pipeline does.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from digit.core.errors import DigitError
from digit.core.files import write_bytes
from digit.core.transforms import center_crop, resize_shorter

MAX_PIXELS = 89_478_485
"""Larger images are refused: a small file can unpack into gigabytes. Pillow's own figure, 256 MiB of RGB."""

EXTENSIONS = frozenset(
    ["png", "jpg", "jpeg", "jpe", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "jp2"]
)
"""Suffixes of files that are taken for images where nobody looks inside each file of a folder or an archive."""


class Decoded(NamedTuple):
    """An upright 8-bit RGB image, what was changed, such as "palette", and Pillow's name of the format, as "JPEG"."""

    image: Image.Image
    notes: tuple[str, ...]
    format: str


def decode(
    source: str | Path | bytes, name: object = None, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> Decoded:
    """Read any image Pillow knows as upright 8-bit RGB.

    Palettes, CMYK, grey and 16 bits are converted; transparency is composited on white; the EXIF orientation is
    applied; of an animation the first frame is taken.

    Args:
        source: a path, or the bytes of a file.
        name: how to call it in an error, anything with a ``str``; by default its path.
        formats: Pillow's names of the file formats that are accepted; None accepts all.

    Raises:
        DigitError: names the file: missing, unreadable, not an image, truncated or damaged, or of more than
            ``max_pixels``.
    """
    if isinstance(source, bytes):
        name = name or f"the image of {len(source):,} bytes"
    elif not Path(source).exists():
        raise DigitError(f"There is no image file {source}.")
    elif not Path(source).is_file():
        raise DigitError(f"{source} is not a file but a folder.")
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as handle:
            image = Image.open(handle, formats=None if formats is None else list(formats))
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            return _decode(image, name or source)
    except DigitError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DigitError(
            f"{name or source} has more than {max_pixels:,} pixels, which is refused as a safeguard; scale it down "
            "first."
        ) from error
    except UnidentifiedImageError as error:
        known = "any format that Pillow can read" if formats is None else f"one of the formats {', '.join(formats)}"
        raise DigitError(f"{name or source} is not an image in {known}.") from error
    except PermissionError as error:
        raise DigitError(f"Cannot read {source!r}: {error.strerror}.") from error
    except Exception as error:  # the decoders raise a dozen different types on damaged files
        raise DigitError(f"{name or source} is damaged or truncated and cannot be decoded ({error}).") from error


def _decode(image: ImageFile.ImageFile, name: object) -> Decoded:
    notes, format = [], image.format or ""
    # MPO is what cameras write for one photograph with previews
    if format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"animated, {frames} frames, the first one used")
    if image.mode == "RGB" and any("16" in str(tile[3]) for tile in image.tile):  # Pillow itself keeps the high byte
        notes.append("16 bits a channel")
    image.load()
    upright: Image.Image = image
    with suppress(Exception):  # a broken EXIF block does not spoil the image
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image)
        notes += ["EXIF rotation"] * turned
    mode = upright.mode
    if mode in ("I", "F") or mode.startswith("I;"):
        notes.append("16 bits a pixel" if mode != "F" else "floating point")
        rgb = _scale_deep(upright, name)
    elif mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in upright.info:
        notes.append(f"transparency ({mode}), composited on white")
        rgba = upright.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        notes += [] if mode == "RGB" else [{"P": "palette", "L": "grey", "1": "black and white"}.get(mode, mode)]
        rgb = upright.convert("RGB")
    rgb.info = {}
    return Decoded(rgb, tuple(notes), format)


def _scale_deep(image: Image.Image, name: object) -> Image.Image:
    """16-bit grey (0..65535) or floating-point grey (0..1) to 8 bits; Pillow's own conversion would clip at 255."""
    values = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise DigitError(f"{name} holds values outside 0..{top:g} (mode {image.mode}); save it as 8-bit RGB first.")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8)).convert("RGB")


def load_image(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One image as :func:`decode` reads it; of an animation the first frame, with a warning."""
    image, notes, _ = decode(source, None, max_pixels)
    for note in notes:
        if note.startswith("animated"):
            warnings.warn(f"{'The image' if isinstance(source, bytes) else source} is {note}.", stacklevel=2)
    return image


def load_images(paths: str | Path | Sequence[str | Path | bytes], size: int | None = None) -> torch.Tensor:
    """Read images, by one path or a sequence of paths or file contents, into a float32 tensor (B, 3, H, W) in 0..1.

    ``size`` scales the shorter side to this many pixels (bicubic) and takes the center crop. A DigitError where nothing
    was given, an image cannot be read, or the sizes differ and no ``size`` was given.
    """
    sources = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not sources:
        raise DigitError("No images were given; expected at least one path.")
    images = [load_image(source) for source in sources]
    if size is not None:
        images = [center_crop(resize_shorter(image, size), size) for image in images]
    for source, image in zip(sources, images, strict=True):
        if image.size != images[0].size:
            name = source if not isinstance(source, bytes) else "one"
            raise DigitError(
                f"The images differ in size: {name} is {image.width}x{image.height}, the first is "
                f"{images[0].width}x{images[0].height}. Give a size to scale them all to."
            )
    return torch.stack([to_tensor(image) for image in images])


def to_tensor(image: Image.Image | NDArray[np.uint8]) -> torch.Tensor:
    """8-bit RGB to float32 in 0..1 by division by 255: an image or (..., H, W, 3) to (..., 3, H, W)."""
    pixels = torch.from_numpy(np.array(image.convert("RGB") if isinstance(image, Image.Image) else image))
    return pixels.movedim(-1, -3).contiguous().float().div_(255)


def to_uint8(images: torch.Tensor) -> NDArray[np.uint8]:
    """(..., 3, H, W) in 0..1, of any float type, to 8 bits (..., H, W, 3); a DigitError where there is a NaN.

    Values are clamped to 0..1, multiplied by 255 and rounded to the nearest integer (halves to even), so that
    ``to_uint8(to_tensor(x))`` is ``x``.
    """
    values = images.detach().float()
    if torch.isnan(values).any():
        raise DigitError("The images hold NaN, so the model that made them has diverged or its weights are damaged.")
    pixels = values.clamp(0, 1).mul(255).round().to(torch.uint8).movedim(-3, -1)  # (..., H, W, 3)
    array: NDArray[np.uint8] = pixels.cpu().contiguous().numpy()
    return array


def to_pil(image: torch.Tensor) -> Image.Image:
    """One image (3, H, W) in 0..1 as a Pillow image; for the rounding see :func:`to_uint8`."""
    return Image.fromarray(to_uint8(image))


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file with the image's pixels and nothing else."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image | torch.Tensor, path: str | Path) -> Path:
    """Write an image or a (3, H, W) tensor in 0..1 as PNG, whole or not at all, making folders as needed."""
    return write_bytes(path, encode_png(image if isinstance(image, Image.Image) else to_pil(image)))
