"""``generate``, ``tokenize``, ``decode`` and ``reconstruct``: what one does with a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline

Model = Annotated[
    str | None, typer.Argument(help="A model folder, a Hub id, or a packaged model; the packaged one if left out.")
]
RequiredModel = Annotated[str, typer.Argument(help="A model folder, a Hub id, or the name of a packaged model.")]
Images = Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")]
Seed = Annotated[int, typer.Option(min=0, help="Picture i of a seed is always the same picture.")]
Decoder = Annotated[str | None, typer.Option(help="Kind of decoder: ar, masked, onepass. Default: the model's.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="Numbers that prior and decoder compute in: fp32, bf16, fp16.")]
Variant = Annotated[str | None, typer.Option(help="Which model of a Hub repository with several.")]


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    from digit.cli.edit import edit

    app.command()(generate)
    app.command()(edit)
    app.command()(tokenize)
    app.command()(decode)
    app.command()(reconstruct)


def load(
    model: str | None, device: str | None = None, dtype: str = "fp32", variant: str | None = None
) -> DigitPipeline:
    """A pipeline on its device, from what the user typed."""
    import torch

    from digit.core.devices import pick_device, pick_dtype
    from digit.pipeline.pipeline import DigitPipeline

    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one device a process, as torchrun numbers them
    where = pick_device(device)
    kind = pick_dtype(dtype)
    return DigitPipeline.from_pretrained(model, variant=variant).to(where, None if kind == torch.float32 else kind)


def generate(
    model: Model = None,
    out: Out = Path("generated"),
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many pictures.")] = 64,
    labels: Annotated[
        str | None, typer.Option(help="Classes by number or name, comma separated; taken in turns. Default: all.")
    ] = None,
    seed: Seed = 0,
    decoder: Decoder = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Iterations of the masked decoder.")] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")] = None,
    cfg_schedule: Annotated[str | None, typer.Option(help="constant, linear, cosine or power-cosine.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the prior; 0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the prior: keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of the prior: keep the likeliest tokens up to probability p.")
    ] = None,
    decoder_temperature: Annotated[float | None, typer.Option(help="The same, of the decoder.")] = None,
    decoder_top_k: Annotated[int | None, typer.Option(help="The same, of the decoder.")] = None,
    decoder_top_p: Annotated[float | None, typer.Option(help="The same, of the decoder.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at a time; does not change them.")] = None,
    save_tokens: Annotated[bool, typer.Option("--save-tokens", help="Also write tokens.npz.")] = False,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the sampling steps, or run plain PyTorch. Default: on a CPU a step in C++; else compile if there is much to do.",
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: narrow weights on a CPU; faster, tokens change slightly.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where --out holds another run.")] = False,
    dtype: Dtype = "fp32",
    device: Device = None,
    variant: Variant = None,
) -> None:
    """Generate pictures into a folder: 00000.png ..., grid.png, generation.json.

    A run that was stopped goes on when the same command is given again. Under torchrun or accelerate launch, every
    process makes its share of the pictures.

    Examples:
      digit generate --out pictures

      digit generate cifar10 --num 16 --labels cat,ship --cfg-scale 2 --out pictures

      digit generate DAMO-NLP-SG/DiGIT --variant base-cond --labels 207 --top-k 300 --out dogs
    """
    from digit.pipeline.generation import generate_folder

    pipe = load(model, device, dtype, variant)
    record = generate_folder(
        pipe, out, num, parse_labels(labels, pipe), seed, decoder, batch_size, save_tokens, compile, quantize, overwrite,
        steps=steps, cfg_scale=cfg_scale, cfg_schedule=cfg_schedule, temperature=temperature, top_k=top_k, top_p=top_p,
        decoder_temperature=decoder_temperature, decoder_top_k=decoder_top_k, decoder_top_p=decoder_top_p,
    )  # fmt: skip
    if not record["made"] and record["finished"]:
        typer.echo(f"All {record['num']} pictures are there already: {out}")
    else:
        speed = f"{record['made']} pictures in {record['seconds']:.1f} s ({record['images_per_second']:.2f} a second)"
        compiling = f", of it {record['compile_seconds']:.0f} s for compiling" if record["compile_seconds"] >= 1 else ""
        step = f", sampled by the {record['engine']} step" if record["engine"] else ""
        typer.echo(f"{speed}{compiling}{step}: {out}")
    if record["finished"]:
        typer.echo(f"Look at {out / 'grid.png'}")


def parse_labels(text: str | None, pipe: DigitPipeline) -> list[int] | None:
    """Classes by number or name, such as "3,5" or "cat,ship", to numbers.

    Raises:
        DigitError: a name that is not a class.
    """
    return None if text is None else [pipe.class_number(word.strip()) for word in text.split(",")]


def read_pictures(paths: list[Path], size: int):  # type: ignore[no-untyped-def]
    """Paths of images and folders, and the images (B, 3, size, size)."""
    from digit.core.errors import DigitError
    from digit.core.images import EXTENSIONS, load_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower().lstrip(".") in EXTENSIONS)
            if not inside:
                raise DigitError(f"The folder {path} holds no images.")
            files += inside
        else:
            files.append(path)
    return files, load_images(files, size)


def tokenize(
    model: RequiredModel,
    images: Images,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz file to write.")] = Path("tokens.npz"),
    device: Device = None,
) -> None:
    """Turn pictures into tokens: semantic (B, N) and, where the model has a VQGAN, vq (B, M), in one .npz file.

    Example:  digit tokenize cifar10 cat.png dog.jpg --out tokens.npz
    """
    import torch

    from digit.pipeline.generation import save_tokens_file
    from digit.pipeline.pipeline import Tokens

    pipe = load(model, device)
    size = pipe.vqgan.config.resolution if pipe.vqgan is not None else pipe.tokenizer.image_size
    files, pixels = read_pictures(images, size)
    pixels = pixels.to(pipe.device)
    with torch.inference_mode():
        semantic = None if pipe.space == "vq" else pipe.tokenizer.encode(pixels)
        vq = None if pipe.vqgan is None else pipe.vqgan.encode(pixels)
    save_tokens_file(out, Tokens(semantic, vq))
    typer.echo(f"Tokens of {len(files)} pictures: {out}")


def decode(
    model: RequiredModel,
    tokens: Annotated[Path, typer.Argument(help="A file made by digit tokenize, or by digit generate --save-tokens.")],
    out: Out = Path("decoded"),
    seed: Seed = 0,
    decoder: Decoder = None,
    device: Device = None,
) -> None:
    """Turn tokens back into pictures: semantic tokens through a decoder, or VQ tokens alone where there are no others.

    Example:  digit decode cifar10 tokens.npz --out decoded
    """
    from digit.core.grids import picture_grid
    from digit.core.images import save_png, to_pil
    from digit.pipeline.generation import load_tokens_file

    pipe = load(model, device)
    grids = load_tokens_file(tokens)
    if grids.semantic is not None and pipe.space == "semantic":
        pixels = pipe.decode(grids.semantic, seed, decoder)
    else:
        pixels = pipe.to_pixels(grids)
    pictures = [to_pil(image) for image in pixels]
    for index, picture in enumerate(pictures):
        save_png(picture, out / f"{index:05d}.png")
    save_png(picture_grid(pictures[:64]), out / "grid.png")
    typer.echo(f"{len(pictures)} pictures: {out}")


def reconstruct(
    model: RequiredModel, images: Images, out: Out = Path("reconstructed"), seed: Seed = 0, decoder: Decoder = None,
    device: Device = None,
) -> None:  # fmt: skip
    """Send pictures through the model: one row each of image, semantic tokens, VQGAN alone, full path.

    Example:  digit reconstruct cifar10 photos/ --out reconstructed
    """
    from digit.core.images import save_png
    from digit.pipeline.reconstruction import reconstruction_sheet

    pipe = load(model, device)
    files, pixels = read_pictures(images, pipe.image_size)
    sheet, pictures = reconstruction_sheet(pipe, pixels, seed, decoder)
    for file, picture in zip(files, pictures, strict=True):
        save_png(picture, out / f"{file.stem}.png")
    save_png(sheet, out / "reconstructions.png")
    typer.echo(f"{len(files)} pictures: {out}; side by side in {out / 'reconstructions.png'}")
