"""``edit``: change given images through their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from digit.cli import options
from digit.core.errors import DigitError


@options.with_settings("steps", "cfg_scale", "temperature", "top_k")
def edit(
    model: options.RequiredModel,
    images: options.Images,
    mask: Annotated[
        Path | None, typer.Option(help="An image, white where to sample anew and black where to keep.")
    ] = None,
    prefix: Annotated[
        int | None, typer.Option(min=0, help="Keep the first rows of tokens and continue from them.")
    ] = None,
    vary: Annotated[
        float | None, typer.Option(help="Sample this fraction of the tokens anew, at random places.")
    ] = None,
    out: options.Out = Path("edited"),
    num: Annotated[int, options.num("Results for each image.")] = 4,
    labels: options.Labels = None,
    seed: options.Seed = 0,
    decoder: options.Decoder = None,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    **settings: Any,
) -> None:
    """Edit images: sample a region anew (--mask), continue from the first rows (--prefix), or make variations
    (--vary).

    Writes NAME-0.png ... for each image, and edits.png: each image and its results in a row.

    Examples:
      digit edit cifar10 cat.png --mask hole.png --decoder masked --out repaired

      digit edit cifar10 cat.png --prefix 8 --num 6 --out continued

      digit edit cifar10 cat.png --vary 0.3 --out variations
    """
    from digit.pipeline.editing import edit_images
    from digit.sampling.request import SampleRequest

    if sum(way is not None for way in (mask, prefix, vary)) != 1:
        raise DigitError(
            "Say what to do with the images: exactly one of --mask FILE, --prefix ROWS or --vary FRACTION."
        )
    pipe = options.load(model, device, dtype)
    files, pixels = options.read_images(images, pipe.image_size)
    request = SampleRequest(seed=seed, decoder=decoder, settings=settings)
    sheet = edit_images(pipe, files, pixels, out, num, request, options.parse_labels(labels, pipe), mask, prefix, vary)
    typer.echo(f"{len(files) * num} images: {out}; side by side in {sheet}")
