"""``generate``, ``edit``, ``tokenize``, ``decode`` and ``reconstruct``: what one does with a model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from digit.cli import options
from digit.cli.options import argument, option
from digit.core.errors import DigitError
from digit.sampling.request import SETTINGS, SampleRequest


@options.with_settings(*SETTINGS)
def generate(
    model: options.Model = None,
    out: options.Out = Path("generated"),
    num: Annotated[int | None, options.num("How many images. Default: 64.")] = None,
    labels: options.RunLabels = None,
    labels_per_class: options.LabelsPerClass = None,
    npz: Annotated[Path | None, option("Also pack all images into this .npz: arr_0, as ADM's evaluator reads.")] = None,
    seed: options.Seed = 0,
    decoder: options.Decoder = None,
    batch_size: Annotated[int | None, option("Images at a time; does not change the results.", min=1)] = None,
    save_tokens: Annotated[bool, option("Also write tokens.npz.", "--save-tokens")] = False,
    compile: Annotated[
        bool | None, option("Compile sampling, or run plain PyTorch. Default: C++ on a CPU; else compile if it pays.")
    ] = None,
    quantize: Annotated[str | None, option("int8: narrow weights on a CPU; faster, tokens change slightly.")] = None,
    overwrite: Annotated[bool, option("Begin anew where --out holds another run.", "--overwrite")] = False,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    variant: options.Variant = None,
    **settings: Any,
) -> None:
    """Generate images into a folder: 00000.png ..., grid.png, generation.json.

    A run that was stopped goes on when the same command is given again. Under torchrun or accelerate launch, every
    process makes its share of the images.

    Examples:
      digit generate --out images

      digit generate cifar10 --num 16 --labels cat,ship --cfg-scale 2 --out images

      digit generate DAMO-NLP-SG/DiGIT --variant base-cond --labels 207 --top-k 300 --out dogs
    """
    from digit.pipeline.generation import generate_folder

    pipe = options.load(model, device, dtype, variant)
    try:
        chosen = labels if labels == "random" else options.parse_labels(labels, pipe)
        record = generate_folder(
            pipe, out, num, chosen, seed, decoder, batch_size, save_tokens, compile, quantize, overwrite,
            labels_per_class, npz, **settings,
        )  # fmt: skip
    except KeyboardInterrupt:
        again = shlex.join(["digit", *(word for word in sys.argv[1:] if word != "--overwrite")])
        typer.echo(f"Stopped; finished images are in {out}. The same command makes the rest: {again}", err=True)
        raise
    if not record["made"] and record["finished"]:
        typer.echo(f"All {record['num']} images are there already: {out}")
    else:
        speed = f"{record['made']} images in {record['seconds']:.1f} s ({record['images_per_second']:.2f} a second)"
        compiling = f", of it {record['compile_seconds']:.0f} s for compiling" if record["compile_seconds"] >= 1 else ""
        step = f", sampled by the {record['engine']} step" if record["engine"] else ""
        typer.echo(f"{speed}{compiling}{step}: {out}")
    if record["finished"]:
        typer.echo(f"Look at {out / 'grid.png'}")
        if npz is not None:
            typer.echo(f"All images in one array: {npz}")


@options.with_settings("steps", "cfg_scale", "temperature", "top_k")
def edit(
    model: options.RequiredModel,
    images: options.Images,
    mask: Annotated[Path | None, option("An image, white where to sample anew and black where to keep.")] = None,
    prefix: Annotated[int | None, option("Keep the first rows of tokens and continue from them.", min=0)] = None,
    vary: Annotated[float | None, option("Sample this fraction of the tokens anew, at random places.")] = None,
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

    if sum(way is not None for way in (mask, prefix, vary)) != 1:
        raise DigitError(
            "Say what to do with the images: exactly one of --mask FILE, --prefix ROWS or --vary FRACTION."
        )
    pipe = options.load(model, device, dtype)
    files, pixels = options.read_images(images, pipe.image_size)
    request = SampleRequest(seed=seed, decoder=decoder, settings=settings)
    sheet = edit_images(pipe, files, pixels, out, num, request, options.parse_labels(labels, pipe), mask, prefix, vary)
    typer.echo(f"{len(files) * num} images: {out}; side by side in {sheet}")


def tokenize(
    model: options.RequiredModel,
    images: options.Images,
    out: Annotated[Path, options.out("The .npz file to write.")] = Path("tokens.npz"),
    device: options.Device = None,
) -> None:
    """Turn images into tokens: semantic (B, N) and, where the model has a VQGAN, vq (B, M), in one .npz file.

    Example:  digit tokenize cifar10 cat.png dog.jpg --out tokens.npz
    """
    from digit.pipeline.tokenizer import VQTokenizer
    from digit.pipeline.tokens import Tokens, save_tokens_file

    pipe = options.load(model, device)
    tokenizers = {pipe.space: pipe.prior_tokenizer}
    if pipe.vqgan is not None:
        tokenizers["vq"] = VQTokenizer(pipe.vqgan)
    files, pixels = options.read_images(images, pipe.image_size)
    save_tokens_file(out, Tokens.of({space: tokenizer.encode(pixels) for space, tokenizer in tokenizers.items()}))
    typer.echo(f"Tokens of {len(files)} images: {out}")


def decode(
    model: options.RequiredModel,
    tokens: Annotated[Path, argument("A file made by digit tokenize, or by digit generate --save-tokens.")],
    out: options.Out = Path("decoded"),
    seed: options.Seed = 0,
    decoder: options.Decoder = None,
    device: options.Device = None,
) -> None:
    """Turn tokens back into images: semantic tokens through a decoder, or VQ tokens alone where there are no others.
    Labels in the file count where the decoder knows classes.

    Example:  digit decode cifar10 tokens.npz --out decoded
    """
    from digit.core.grids import image_grid
    from digit.core.images import save_png, to_pil
    from digit.pipeline.tokens import load_tokens_file

    pipe = options.load(model, device)
    given = load_tokens_file(tokens)
    first = getattr(given, pipe.space)
    pixels = pipe.to_pixels(given) if first is None else pipe.decode(first, seed, decoder, given.labels)
    decoded = [to_pil(image) for image in pixels]
    for index, image in enumerate(decoded):
        save_png(image, out / f"{index:05d}.png")
    save_png(image_grid(decoded[:64]), out / "grid.png")
    typer.echo(f"{len(decoded)} images: {out}")


def reconstruct(
    model: options.RequiredModel,
    images: options.Images,
    out: options.Out = Path("reconstructed"),
    seed: options.Seed = 0,
    decoder: options.Decoder = None,
    device: options.Device = None,
) -> None:
    """Send images through the model: one row each of image, semantic tokens, VQGAN alone, full path.

    Example:  digit reconstruct cifar10 photos/ --out reconstructed
    """
    from digit.core.images import save_png
    from digit.pipeline.reconstruction import reconstruction_sheet

    pipe = options.load(model, device)
    files, pixels = options.read_images(images, pipe.image_size)
    sheet, made = reconstruction_sheet(pipe, pixels, seed, decoder)
    for file, image in zip(files, made, strict=True):
        save_png(image, out / f"{file.stem}.png")
    save_png(sheet, out / "reconstructions.png")
    typer.echo(f"{len(files)} images: {out}; side by side in {out / 'reconstructions.png'}")
