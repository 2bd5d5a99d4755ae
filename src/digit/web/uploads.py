"""Pictures from strangers: checked, decoded, scaled to the model's size, and never written anywhere."""

from __future__ import annotations

import base64
import binascii

from PIL import Image

from digit.core.images import decode
from digit.core.transforms import center_crop, resize_shorter
from digit.web.limits import MIB, Limits, Refused, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What browsers make. Pillow knows many more, one of which starts another program."""


def read_picture(text: str, size: int, limits: Limits) -> Image.Image:
    """A picture as a request carries it.

    Args:
        text: base64 of a file, or a data URL of it. It is never taken for a path or an address.
        size: side of the square that is returned; the shorter side is scaled to it and the middle cut out.
        limits: of bytes and pixels.

    Raises:
        Refused: not base64 of a picture in one of :data:`FORMATS`, or too large.
    """
    data = from_base64(text, limits)
    image = decode(data, "The uploaded file", limits.megapixels * 1_000_000, FORMATS).image
    return center_crop(resize_shorter(image, size), size)


def from_base64(text: str, limits: Limits) -> bytes:
    """The bytes of an uploaded file.

    Raises:
        Refused: it is not base64, or too large.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise Refused(
                "The picture is a data URL without ';base64'; expected base64 of a PNG, JPEG, WebP, GIF or BMP file."
            )
    if len(text) > limits.body_bytes:
        raise TooLarge(f"The picture is larger than {limits.upload_mb} MiB, which is the most that is taken here.")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("The picture is not base64 of a file; paths and addresses are not opened here.") from error
    if len(data) > limits.upload_bytes:
        raise TooLarge(f"The picture has {len(data) / MIB:.1f} MiB; at most {limits.upload_mb} are taken here.")
    return data
