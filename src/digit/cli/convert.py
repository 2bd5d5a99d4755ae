"""``convert``: other people's checkpoints to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from digit.cli import options
from digit.cli.model import info
from digit.cli.options import argument, option

converters = typer.Typer(no_args_is_help=True)

Given = Path | None


@converters.command("digit-upstream")
def digit_upstream(
    out: Annotated[Path, options.out("The model folder to write.")],
    stage1: Annotated[Given, option("Prior: fairseq checkpoint (also VQ-only, linear probe).")] = None,
    stage2: Annotated[Given, option("AR decoder: fairseq checkpoint.")] = None,
    stage2_masked: Annotated[Given, option("Masked decoder (NAR): fairseq checkpoint.")] = None,
    codebook: Annotated[Given, option("km_*.npy; by default the centroids inside the checkpoints.")] = None,
    vqgan: Annotated[Given, option("vqgan_jax_strongaug.ckpt; by default the one inside the checkpoints.")] = None,
    encoder: Annotated[Given, option("dinov2_*_reg4_pretrain.pth; by default the one inside the checkpoints.")] = None,
    heads: Annotated[int | None, option("Attention heads of the encoder; by default width / 64.", min=1)] = None,
    half_precision_tokens: Annotated[
        bool, option("Assign semantic tokens in float16, as the authors' runs did.", "--half-precision-tokens")
    ] = False,
    name: Annotated[str | None, option("Name of the model; by default the folder's.")] = None,
) -> None:
    """Convert what the DiGIT authors publish to one model folder. Their checkpoints hold encoder, codebook and VQGAN
    too.

    Example:  digit convert digit-upstream --stage1 stage1/checkpoint_last.pt --stage2 stage2/checkpoint_last.pt --out
        digit-base
    """
    from digit.convert.upstream import convert_upstream

    checkpoints, frozen = (stage1, stage2, stage2_masked), (codebook, vqgan, encoder)
    info(str(convert_upstream(out, *checkpoints, *frozen, heads, half_precision_tokens, name)))


@converters.command("vqgan")
def vqgan(
    checkpoint: Annotated[Path, argument("MAGE's vqgan_jax_strongaug.ckpt.")],
    out: Annotated[Path, options.out("The VQGAN folder to write.")],
    resolution: Annotated[int, option("Side of its images, in pixels.", min=16)] = 256,
) -> None:
    """Convert a VQGAN alone.

    Example:  digit convert vqgan vqgan_jax_strongaug.ckpt --out vqgan
    """
    from digit.convert.vqgan import convert_vqgan

    typer.echo(f"Saved: {convert_vqgan(checkpoint, out, resolution)}")


@converters.command("encoder")
def encoder(
    source: Annotated[str, argument("A .pth of DINOv2, DINO, iBOT, MAE or MoCo v3; a folder; or a Hub id.")],
    out: Annotated[Path, options.out("The encoder folder to write.")],
    layer: Annotated[int | None, option("Block whose output is taken, from the end. The paper: -3.")] = None,
    layers: Annotated[str | None, option("Several blocks instead of one, such as -4,-3,-2,-1; see --combine.")] = None,
    combine: Annotated[Literal["sum", "mean", "concat"], option("How they become one feature.")] = "sum",
    image_size: Annotated[int | None, option("Side of the images that come in.", min=1)] = None,
    resize: Annotated[int | None, option("Side that the network sees.", min=1)] = None,
    family: Annotated[str | None, option("dinov2, dino, ibot, mae or mocov3, where the file does not tell.")] = None,
    heads: Annotated[int | None, option("Attention heads; by default as published.", min=1)] = None,
    positions: Annotated[
        Literal["hub", "dinov2-offset"] | None, option("hub, or dinov2-offset as the authors; DINOv2's default.")
    ] = None,
) -> None:
    """Convert a frozen encoder alone.

    Example:  digit convert encoder facebook/dinov2-with-registers-base --out encoder
    """
    from digit.encoders import load_encoder

    how: dict[str, Any] = {"layer": layer, "positions": positions, "family": family, "heads": heads}
    if layers:
        how |= {"layers": tuple(map(int, options.numbers(layers, "--layers"))), "combine": combine}
    loaded = load_encoder(source, image_size=image_size, resize=resize, **how)
    loaded.save_pretrained(out)
    rows, columns = loaded.grid
    typer.echo(f"Saved: {out} ({rows} x {columns} features of width {loaded.dim} an image)")
