"""``digit data``: make datasets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from digit.cli import options
from digit.cli.options import argument, option
from digit.core.errors import DigitError

app = typer.Typer(help="Make datasets of images.", no_args_is_help=True)

Out = Annotated[Path, options.out("The dataset folder to create; an older dataset there is replaced.")]


@app.command()
def cifar10(
    out: Out,
    source: Annotated[Path | None, option("A folder or archive with the python pickles or the parquet files.")] = None,
) -> None:
    """Build CIFAR-10 (60,000 images of 32x32) and check it against frozen checksums.

    Without --source it looks in the cache, then on the Hub (uoft-cs/cifar10).

    Example: digit data cifar10 --out data/cifar10

    Example: digit data cifar10 --source ~/Downloads/cifar-10-python.tar.gz --out data/cifar10
    """
    from digit.data.cifar10 import build_cifar10
    from digit.data.dataset import read_description

    folder = build_cifar10(out, source)
    counts = {name: split["count"] for name, split in read_description(folder)["splits"].items()}
    typer.echo(f"CIFAR-10, verified: {counts['train']:,} train and {counts['test']:,} test images in {folder}")


@app.command()
def folder(
    source: Annotated[Path, argument("A folder of images, loose or in a folder for each class.")],
    out: Out,
    size: Annotated[int | None, option("Scale the shorter side to this and take the center crop.", min=1)] = None,
    filter: Annotated[str, option("How it is scaled: bicubic, bilinear, lanczos or box.")] = "bicubic",
) -> None:
    """Make a dataset of your own images. Every file is accounted for in OUT/report.json.

    Example: digit data folder ~/photos --size 256 --out data/photos
    """
    from digit.data.folder import import_folder

    report = import_folder(source, out, size, filter)
    typer.echo(report.summary())
    typer.echo(f"The dataset is in {out}; {out / 'report.json'} names every converted, animated and skipped file.")


@app.command()
def export(
    data: Annotated[str, argument("A dataset made by digit data, a folder, tar shards, or a Hub id.")],
    out: Annotated[Path, options.out("The folder to create, with a folder for each class.")],
    split: options.Split = "train",
    num: options.Num = None,
) -> None:
    """Write the images of a dataset as PNG files.

    Example: digit data export data/cifar10 --split test --num 100 --out runs/photos
    """
    from digit.core.images import save_png
    from digit.core.progress import bar
    from digit.evaluation.model_source import open_images

    if out.exists() and any(out.iterdir()):
        raise DigitError(f"The folder {out} is not empty; choose another --out.")
    images = open_images(data, split, num)
    folders = [re.sub(r"[^\w-]+", "_", name) for name in images.classes]  # others chose the names
    with bar("Writing", len(images)) as shown:
        for index in range(len(images)):
            sample = images[index]
            place = out if sample.label is None else out / folders[sample.label]
            save_png(sample.image, place / f"{index:05d}.png")
            shown.advance()
    typer.echo(f"{len(images):,} images in {out}")
