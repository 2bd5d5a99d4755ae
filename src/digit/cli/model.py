"""``assemble`` and ``tour``: put trained parts together, and the whole chain from raw photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli.options import StoredDtype, out_option


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command()(assemble)
    app.command()(tour)


Part = Path | None


def assemble(
    out: Annotated[Path, out_option("The model folder to write.")],
    encoder: Annotated[Part, typer.Option(help="Encoder: a folder made by digit train encoder (or convert).")] = None,
    codebook: Annotated[Part, typer.Option(help="Codebook: a folder made by digit fit-codebook.")] = None,
    vqgan: Annotated[Part, typer.Option(help="VQGAN: a folder made by digit train vqgan (or convert).")] = None,
    prior: Annotated[Part, typer.Option(help="Prior: a folder made by digit train prior.")] = None,
    decoder: Annotated[list[str] | None, typer.Option(help="Decoder, or rae:SOURCE; for several kinds.")] = None,
    base: Annotated[str | None, typer.Option(help="A model whose other parts are taken over.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the folder's.")] = None,
    class_names: Annotated[str | None, typer.Option(help="Class names, comma separated.")] = None,
    default: Annotated[
        list[str] | None,
        typer.Option(help="A default of sampling, such as prior.cfg_scale=1.5 or ar.top_p=0.9; repeatable."),
    ] = None,
    default_decoder: Annotated[str | None, typer.Option(help="Kind of decoder used when none is asked for.")] = None,
    dtype: StoredDtype = "float32",
) -> None:
    """Put trained parts together to one model folder. Parts may be missing: encoder + codebook + VQGAN are enough for
    caching tokens.

    A training run's folder may be given for a part: its model/ is taken. The SOURCE of rae:SOURCE is a folder or
    a Hub id of an AutoencoderRAE of diffusers.

    Example:  digit assemble --encoder runs/encoder --codebook runs/codebook --vqgan runs/vqgan --out runs/tokenizers
    Example:  digit assemble --base runs/model --default prior.cfg_scale=1.5 --dtype fp16 --out small
    """
    from digit.core.devices import pick_dtype
    from digit.pipeline.assembly import assemble as put_together
    from digit.pipeline.assembly import with_defaults

    names = None if class_names is None else [n.strip() for n in class_names.split(",")]
    pipe = put_together(encoder, codebook, vqgan, prior, decoder or [], base, name or out.resolve().name, names)
    pipe = with_defaults(pipe, default or [], default_decoder)
    pipe.save_pretrained(out, None if (stored := pick_dtype(dtype)).itemsize == 4 else stored)
    typer.echo(f"{pipe!r}")
    typer.echo(f"Saved: {out}")


def tour(
    out: Annotated[Path, out_option("Folder for the models and images.")] = Path("runs/tour"),
    data: Annotated[
        Path | None, typer.Option(help="A dataset made by digit data; CIFAR-10 is built if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Take raw photographs through every stage at a small preset: encoder, codebook, VQGAN, tokens, prior, decoders,
    images.

    Leaves samples.png, reconstructions.png, loss.png, summary.json and the model. Takes ten to thirty minutes on two cores.
    """
    from digit.evaluation.studies.tour import run_tour

    summary = run_tour(out, data, seed)
    for name in ("samples.png", "reconstructions.png", "loss.png", "summary.json"):
        typer.echo(f"  {out / name}")
    typer.echo(
        f"The tour took {summary['seconds'] / 60:.1f} minutes. Generate more: digit generate {out / 'model'} --out more"
    )
