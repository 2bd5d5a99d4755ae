"""``card`` and ``push``: describe a model, and publish it on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli.options import RequiredModel


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command()(card)
    app.command()(push)


def card(
    model: Annotated[Path, typer.Argument(help="A model folder; its README.md and index are written anew.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Measurements of this model: a folder or a JSON file of digit evaluate; may be repeated."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, by the Hub's identifier, such as mit or cc-by-4.0.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Hub id of the training data; may be repeated.")] = None,
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
    model: RequiredModel,
    repository: Annotated[str, typer.Argument(help="Where to: OWNER/NAME; made if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository readable by its owner alone.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to write to, made if it does not exist. Default: main.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Folder of the repository, for one that holds several models.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the change as a pull request.")] = False,
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
