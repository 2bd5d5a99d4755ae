"""Editing image files into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.grids import picture_grid
from digit.core.images import load_images, save_png, to_pil
from digit.pipeline.editing import continue_rows, edit_region, vary
from digit.pipeline.pipeline import DigitPipeline
from digit.sampling.request import SampleRequest


def edit_pictures(
    pipe: DigitPipeline,
    files: Sequence[Path],
    pixels: Tensor,
    out: Path,
    num: int,
    request: SampleRequest,
    labels: Sequence[int] | None = None,
    mask: Path | None = None,
    prefix: int | None = None,
    fraction: float | None = None,
) -> Path:
    """Edit each image ``num`` times and write the results beside each other.

    Args:
        pipe: a model with all its components.
        files: names of the images.
        pixels: (B, 3, S, S) in 0..1.
        out: folder for ``NAME-0.png`` ... and ``edits.png``.
        num: results an image.
        request: seed, decoder and settings; images and labels follow from the others.
        labels: a class an image, or one for all.
        mask: one file, white where to sample anew; or
        prefix: rows of tokens to keep; or
        fraction: of tokens to sample anew.

    Returns:
        The file of the sheet.
    """
    if labels is not None and len(labels) not in (1, len(files)):
        raise DigitError(
            f"{len(labels)} labels were given for {len(files)} images; expected one for each, or one for all."
        )
    classes = None
    if labels is not None:
        classes = torch.tensor(list(labels) if len(labels) > 1 else list(labels) * len(files)).repeat_interleave(num)
    whole = SampleRequest(range(len(files) * num), request.seed, classes, request.decoder, request.settings).validate(
        pipe
    )
    marked = None if mask is None else load_images(mask, pixels.shape[-1])[0].mean(0) >= 0.5  # (S, S)
    sheet, names = [], _distinct([file.stem for file in files])
    for place, name in enumerate(names):
        given = pixels[place : place + 1].expand(num, -1, -1, -1)  # (num, 3, S, S)
        mine = whole.take(range(place * num, (place + 1) * num))
        if marked is not None:
            tokens = edit_region(pipe, given, marked, mine)
        elif prefix is not None:
            tokens = continue_rows(pipe, given, prefix, mine)
        else:
            assert fraction is not None
            tokens = vary(pipe, given, fraction, mine)
        results = [to_pil(image) for image in pipe.to_pixels(tokens)]
        for index, result in enumerate(results):
            save_png(result, out / f"{name}-{index}.png")
        sheet += [to_pil(pixels[place]), *results]
    return save_png(picture_grid(sheet, columns=num + 1), out / "edits.png")


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of files from several folders, with the place where one occurs twice."""
    return [name if names.count(name) == 1 else f"{name}-{place:03d}" for place, name in enumerate(names)]
