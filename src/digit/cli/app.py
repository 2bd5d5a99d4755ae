"""The ``digit`` command: mounts the commands of this folder, and turns errors into one sentence and exit code 2."""

from __future__ import annotations

import sys
import traceback

import typer
from rich.markup import escape

from digit import __version__
from digit.cli import (
    convert,
    data,
    doctor,
    evaluate,
    evaluate_images,
    evaluate_model,
    generate,
    model,
    presets,
    serve,
    train,
)
from digit.core.errors import DigitError
from digit.core.progress import console

app = typer.Typer(
    name="digit",
    help="Image generation in a stable token space (DiGIT).\n\nStart with:  digit generate --out images",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
_state = {"debug": False}


def _version(show: bool) -> None:
    if show:
        typer.echo(f"digit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    _: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and stop."),
) -> None:
    _state["debug"] = debug


for command in (
    generate.generate, generate.edit, generate.tokenize, generate.decode, generate.reconstruct, model.assemble,
    model.tour,
    train.fit_codebook, train.cache_tokens, train.train, presets.presets, model.info, evaluate.report, serve.serve,
    serve.atlas, model.card, model.push, doctor.doctor,
):  # fmt: skip
    app.command()(command)
evaluation, toy = typer.Typer(no_args_is_help=True), typer.Typer(no_args_is_help=True)
for measurement in (
    evaluate.fidelity, evaluate.statistics, evaluate_model.stability, evaluate_model.probe, evaluate_model.screen,
    evaluate_model.tokens, evaluate_model.ablation, evaluate_images.reconstruction, evaluate_images.sweep,
    evaluate_images.prefix, evaluate_images.robustness, evaluate.paper,
):  # fmt: skip
    evaluation.command()(measurement)
toy.command()(evaluate.pca_lda)
app.add_typer(
    convert.converters,
    name="convert",
    help="Convert other people's checkpoints: DiGIT's authors, MAGE's VQGAN, encoders.",
)
app.add_typer(data.app, name="data", help="Build a dataset: CIFAR-10, or your own folder of images.")
app.add_typer(evaluation, name="evaluate", help="Measure: fidelity, reconstruction, stability, probes, sweeps.")
app.add_typer(toy, name="toy", help="The paper's toy figure.")


def main() -> None:
    """Entry point: errors a user can mend print one sentence and exit with 2; an interrupt exits with 130."""
    try:
        app(prog_name="digit")
    except DigitError as error:
        if _state["debug"]:
            traceback.print_exc()
        console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        sys.exit(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
