"""Editing picture files into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.grids import picture_grid
from digit.core.images import load_images, save_png, to_pil
from digit.pipeline.editing import continue_rows, edit_region, vary
from digit.pipeline.pipeline import DigitPipeline


def edit_pictures(
    pipe: DigitPipeline,
    files: Sequence[Path],
    pixels: Tensor,
    out: Path,
    num: int,
    mask: Path | None = None,
    prefix: int | None = None,
    fraction: float | None = None,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    decoder: str | None = None,
    **settings: Any,
) -> Path:
    """Edit each picture ``num`` times and write the results beside each other.

    Args:
        pipe: a model with all its parts.
        files: names of the pictures.
        pixels: (B, 3, S, S) in 0..1.
        out: folder for ``NAME-0.png`` ... and ``edits.png``.
        num: results a picture.
        mask: one file, white where to sample anew; or
        prefix: rows of tokens to keep; or
        fraction: of tokens to sample anew.
        labels: a class a picture, or one for all.
        seed: of the run.
        decoder: its kind.
        settings: sampling settings.

    Returns:
        The file of the sheet.
    """
    if labels is not None and len(labels) not in (1, len(files)):
        raise DigitError(
            f"{len(labels)} labels were given for {len(files)} pictures; expected one for each, or one for all."
        )
    marked = None if mask is None else load_images(mask, pixels.shape[-1])[0].mean(0) >= 0.5  # (S, S)
    cells, names = [], _distinct([file.stem for file in files])
    for place, name in enumerate(names):
        given = pixels[place : place + 1].expand(num, -1, -1, -1)  # (num, 3, S, S)
        label = None if labels is None else torch.full((num,), labels[place % len(labels)])
        options = {
            "numbers": range(place * num, (place + 1) * num),
            "seed": seed,
            "labels": label,
            "decoder": decoder,
            **settings,
        }
        if marked is not None:
            tokens = edit_region(pipe, given, marked, **options)
        elif prefix is not None:
            tokens = continue_rows(pipe, given, prefix, **options)
        else:
            assert fraction is not None
            tokens = vary(pipe, given, fraction, **options)
        results = [to_pil(image) for image in pipe.to_pixels(tokens)]
        for index, result in enumerate(results):
            save_png(result, out / f"{name}-{index}.png")
        cells += [to_pil(pixels[place]), *results]
    return save_png(picture_grid(cells, columns=num + 1), out / "edits.png")


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of files from several folders, with the place where one occurs twice."""
    return [name if names.count(name) == 1 else f"{name}-{place:03d}" for place, name in enumerate(names)]
