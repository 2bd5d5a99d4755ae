"""Grids of images, and tokens as colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # pixels between the images of a grid
_GOLDEN = 0.618033988749895


def image_grid(
    images: Sequence[Image.Image],
    columns: int = 8,
    scale: int | None = None,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
) -> Image.Image:
    """Lay images of one size out row by row on white, ``columns`` in a row.

    They are enlarged ``scale`` times without smoothing, by default so that an image has at least 96 pixels. Titles
    stand left of each row, and above each column on as many lines as they have.
    """
    width, height = images[0].size
    scale = scale or max(1, -(-96 // max(width, height)))
    w, h = width * scale, height * scale
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(size=16)
    left = max((round(font.getlength(title)) + 12 for title in row_titles), default=0)
    lines = max((title.count("\n") + 1 for title in column_titles), default=0)
    top = lines * 18 + 8 if lines else 0
    sheet = Image.new("RGB", (left + columns * (w + GAP) - GAP, top + rows * (h + GAP) - GAP), "white")
    for column, title in enumerate(column_titles):
        place = (left + column * (w + GAP) + w // 2, top // 2)
        ImageDraw.Draw(sheet).multiline_text(place, title, "black", ImageFont.load_default(13), "mm", align="center")
    for row, title in enumerate(row_titles):
        ImageDraw.Draw(sheet).text((0, top + row * (h + GAP) + h // 2), title, fill="black", font=font, anchor="lm")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image if scale == 1 else image.resize((w, h), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left + column * (w + GAP), top + row * (h + GAP)))
    return sheet


def token_image(tokens: Tensor, grid: tuple[int, int], vocab_size: int, size: int) -> Image.Image:
    """One image's tokens (N,) as coloured cells, ``size`` pixels wide: hues by the golden ratio, so that near ids look
    different.
    """
    colors = [
        colorsys.hsv_to_rgb((i * _GOLDEN) % 1.0, 0.45 + 0.5 * ((i // 7) % 3) / 2, 0.65 + 0.35 * ((i // 3) % 4) / 3)
        for i in range(vocab_size)
    ]
    table = np.rint(np.array(colors) * 255).astype(np.uint8)  # (vocab_size, 3)
    cells = Image.fromarray(table[tokens.cpu().numpy()].reshape(*grid, 3))  # (rows, columns, 3)
    return cells.resize((size, size * grid[0] // grid[1]), Image.Resampling.NEAREST)
