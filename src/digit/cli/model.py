"""``assemble``, ``info``, ``card``, ``push`` and ``tour``: models, from trained parts to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli import options
from digit.cli.options import argument, option

Part = Path | None


def assemble(
    out: Annotated[Path, options.out("The model folder to write.")],
    encoder: Annotated[Part, option("Encoder: a folder made by digit train encoder (or convert).")] = None,
    codebook: Annotated[Part, option("Codebook: a folder made by digit fit-codebook.")] = None,
    vqgan: Annotated[Part, option("VQGAN: a folder made by digit train vqgan (or convert).")] = None,
    prior: Annotated[Part, option("Prior: a folder made by digit train prior.")] = None,
    decoder: Annotated[list[str] | None, option("Decoder, or rae:SOURCE; for several kinds.")] = None,
    base: Annotated[str | None, option("A model whose other parts are taken over.")] = None,
    name: Annotated[str | None, option("Name of the model; by default the folder's.")] = None,
    class_names: Annotated[str | None, option("Class names, comma separated.")] = None,
    default: Annotated[list[str] | None, option("A default, such as prior.cfg_scale=1.5; may be repeated.")] = None,
    default_decoder: Annotated[str | None, option("Kind of decoder used when none is asked for.")] = None,
    dtype: options.StoredDtype = "float32",
) -> None:
    """Put trained parts together to one model folder. Parts may be missing: encoder + codebook + VQGAN are enough for
    caching tokens.

    A training run's folder may be given for a part: its model/ is taken. The SOURCE of rae:SOURCE is a folder or
    a Hub id of an AutoencoderRAE of diffusers.

    Example:  digit assemble --encoder runs/encoder --codebook runs/codebook --vqgan runs/vqgan --out runs/tokenizers
    Example:  digit assemble --base runs/model --default prior.cfg_scale=1.5 --dtype fp16 --out small
    """
    from digit.core.devices import pick_dtype
    from digit.pipeline.assembly import assemble, with_defaults

    names = None if class_names is None else [n.strip() for n in class_names.split(",")]
    pipe = assemble(encoder, codebook, vqgan, prior, decoder or [], base, name or out.resolve().name, names)
    pipe = with_defaults(pipe, default or [], default_decoder)
    pipe.save_pretrained(out, pick_dtype(dtype))
    typer.echo(f"{pipe!r}")
    typer.echo(f"Saved: {out}")


def info(
    model: options.Model = None,
    variant: options.Variant = None,
    batch: Annotated[int, option("Images at a time, for the memory estimate.", min=1)] = 1,
) -> None:
    """Show the parts of a model: sizes, presets, where they come from, and the memory that sampling needs.

    Example:  digit info digit-base --batch 16
    """
    from digit.core.progress import console
    from digit.pipeline.hub import resolve_model
    from digit.pipeline.info import model_tree

    console().print(model_tree(resolve_model(model, variant=variant), batch))


def card(
    model: Annotated[Path, argument("A model folder; its README.md and index are written anew.")],
    results: Annotated[
        list[Path] | None, option("Of this model: a folder or a JSON file of digit evaluate; may be repeated.")
    ] = None,
    license: Annotated[str | None, option("Of the weights, by the Hub's identifier, such as mit or cc-by-4.0.")] = None,
    data: Annotated[list[str] | None, option("Hub id of the training data; may be repeated.")] = None,
) -> None:
    """Write the card of a model: what it is, its parts and training, what was measured, licence, whom to cite.

    What is not given stays as it was. A measurement counts if it was made with the very weights in the folder.

    Example:  digit card runs/model --results runs --license mit --data uoft-cs/cifar10
    """
    from digit.pipeline.card import with_facts
    from digit.pipeline.pipeline import DigitPipeline

    pipe = with_facts(DigitPipeline.from_folder(model), results or [], license, data or [])
    pipe.write_index(model)
    typer.echo(
        f"{len(pipe.card.results)} measured numbers, licence {pipe.card.license or 'not stated'}: {model / 'README.md'}"
    )


def push(
    model: options.RequiredModel,
    repository: Annotated[str, argument("Where to: OWNER/NAME; made if it does not exist.")],
    private: Annotated[bool, option("Make a new repository readable by its owner alone.", "--private")] = False,
    revision: Annotated[str | None, option("Branch to write to, made if it does not exist. Default: main.")] = None,
    variant: Annotated[str | None, option("Folder of the repository, for one that holds several models.")] = None,
    message: Annotated[str | None, option("Of the commit.", "--message", "-m")] = None,
    create_pr: Annotated[bool, option("Propose the change as a pull request.", "--create-pr")] = False,
) -> None:
    """Publish a model on the Hub, as one commit. The token is the one of hf auth login, or $HF_TOKEN.

    Example:  digit push runs/model somebody/cifar10-digit --private
    """
    from digit.pipeline.hub import push_folder, resolve_model

    address = push_folder(
        resolve_model(model), repository, private, None, revision, variant=variant, message=message, create_pr=create_pr
    )
    typer.echo(f"Published: {address}")
    typer.echo(f'Load it with: DigitPipeline.from_pretrained("{repository}")')


def tour(
    out: Annotated[Path, options.out("Folder for the models and images.")] = Path("runs/tour"),
    data: Annotated[Path | None, option("A dataset made by digit data; CIFAR-10 is built if left out.")] = None,
    seed: options.Seed = 0,
) -> None:
    """Take raw photographs through every stage at a small preset: encoder, codebook, VQGAN, tokens, prior, decoders,
    images.

    Leaves samples.png, reconstructions.png, loss.png, summary.json and the model. Takes ten to thirty minutes on two
    cores.
    """
    from digit.evaluation.studies.tour import run_tour

    summary = run_tour(out, data, seed)
    for name in ("samples.png", "reconstructions.png", "loss.png", "summary.json"):
        typer.echo(f"  {out / name}")
    typer.echo(
        f"The tour took {summary['seconds'] / 60:.1f} minutes. Generate more: digit generate {out / 'model'} --out more"
    )
