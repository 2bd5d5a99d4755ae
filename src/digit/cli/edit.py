"""``edit``: change given pictures through their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli.generate import (
    Decoder,
    Device,
    Dtype,
    Images,
    Out,
    RequiredModel,
    Seed,
    load,
    parse_labels,
    read_pictures,
)


def edit(
    model: RequiredModel,
    images: Images,
    mask: Annotated[
        Path | None, typer.Option(help="A picture, white where to sample anew and black where to keep.")
    ] = None,
    prefix: Annotated[
        int | None, typer.Option(min=0, help="Keep the first rows of tokens and continue from them.")
    ] = None,
    vary: Annotated[
        float | None, typer.Option(help="Sample this fraction of the tokens anew, at random places.")
    ] = None,
    out: Out = Path("edited"),
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Results for each picture.")] = 4,
    labels: Annotated[
        str | None, typer.Option(help="The class of each picture by number or name, or one for all.")
    ] = None,
    seed: Seed = 0,
    decoder: Decoder = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations of the masked decoder.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the prior; 0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the prior: keep the k likeliest tokens; 0 keeps all.")] = None,
    dtype: Dtype = "fp32",
    device: Device = None,
) -> None:
    """Edit pictures: sample a region anew (--mask), continue from the first rows (--prefix), or make variations
    (--vary).

    Writes NAME-0.png ... for each picture, and edits.png: each picture and its results in a row.

    Examples:
      digit edit cifar10 cat.png --mask hole.png --decoder masked --out repaired

      digit edit cifar10 cat.png --prefix 8 --num 6 --out continued

      digit edit cifar10 cat.png --vary 0.3 --out variations
    """
    from digit.core.errors import DigitError
    from digit.pipeline.editing_run import edit_pictures

    if sum(way is not None for way in (mask, prefix, vary)) != 1:
        raise DigitError(
            "Say what to do with the pictures: exactly one of --mask FILE, --prefix ROWS or --vary FRACTION."
        )
    pipe = load(model, device, dtype)
    files, pixels = read_pictures(images, pipe.image_size)
    sheet = edit_pictures(
        pipe, files, pixels, out, num, mask, prefix, vary, parse_labels(labels, pipe), seed, decoder,
        steps=steps, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k,
    )  # fmt: skip
    typer.echo(f"{len(files) * num} pictures: {out}; side by side in {sheet}")
