"""``digit evaluate robustness``, and ``digit evaluate paper``: the command behind each table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from digit.cli.evaluate import Settings, save_and_show
from digit.cli.evaluate_images import Images, Metrics, RealImages, ReferenceSplit, fidelity_options, open_reference
from digit.cli.evaluate_model import numbers
from digit.cli.options import (
    Backend,
    BatchSize,
    Device,
    Labels,
    Out,
    RequiredModel,
    Seed,
    Variant,
    Weights,
    load,
    parse_labels,
)  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command()(robustness)
    app.command("paper")(paper)


def robustness(
    model: RequiredModel,
    reference: RealImages,
    decoders: Annotated[
        str | None, typer.Option(help="Kinds, comma separated; all of the model's if left out.")
    ] = None,
    rates: Annotated[str, typer.Option(help="Shares of replaced tokens, comma separated.")] = "0,0.05,0.1,0.2,0.3,0.5",
    num: Images = 1000,
    fixed: Settings = None,
    metrics: Metrics = "fid",
    reference_split: ReferenceSplit = None,
    labels: Labels = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    weights: Weights = "auto",
    backend: Backend = "auto",
    out: Out = Path("robustness"),
    device: Device = None,
    variant: Variant = None,
) -> None:
    """Damaged tokens through each decoder: FID and agreement while semantic tokens are replaced. Repeat an interrupted
    command to go on.

    Example:  digit evaluate robustness cifar10 --num 1000 --reference cifar10-train.npz --out runs/robustness
    """
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.robustness import robustness as measure
    from digit.evaluation.studies.sweep import parse_settings

    pipe = load(model, device, variant=variant)
    run = SamplingRun(pipe, num, seed, parse_labels(labels, pipe), None, batch_size, parse_settings(fixed))
    run.check()  # now, and not after the reference was measured
    kinds, shares = decoders.split(",") if decoders else [], numbers(rates, "--rates")
    real = open_reference(reference, reference_split, fidelity_options(metrics, batch_size), weights, backend, device)
    save_and_show(measure(run, real, out, kinds, shares), out)


def paper() -> None:
    """Print the command behind every table, figure and claim of the paper, at its scale and at a small one."""
    from digit.evaluation.paper import claims_table

    typer.echo(claims_table(), nl=False)
