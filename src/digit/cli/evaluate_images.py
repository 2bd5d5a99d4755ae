"""``digit evaluate reconstruction``, ``sweep`` and ``prefix``: measurements of the images that a model makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from digit.cli.evaluate import Settings, save_and_show
from digit.cli.evaluate_model import numbers
from digit.cli.options import (
    Backend,
    BatchSize,
    Data,
    Decoder,
    Device,
    Labels,
    Num,
    Out,
    RequiredModel,
    Seed,
    Split,
    Variant,
    Weights,
    load,
    num_option,
    parse_labels,
)  # fmt: skip

if TYPE_CHECKING:
    from digit.evaluation.metrics.fidelity import FidelityOptions
    from digit.evaluation.studies.points import Reference

Metrics = Annotated[
    str, typer.Option(help="Any of fid, sfid, kid, prc (precision, recall), isc (Inception Score); comma separated.")
]
ReferenceSplit = Annotated[str | None, typer.Option(help="Split of the reference.")]
Images = Annotated[int, num_option("Images per point.", 2)]
RealImages = Annotated[str, typer.Option(help="The real images, or their .npz of statistics.")]


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    for command in (reconstruction, sweep, prefix):
        app.command()(command)


def fidelity_options(metrics: str, batch_size: int) -> FidelityOptions:
    """Options from comma separated metrics.

    Raises:
        DigitError: an unknown metric, or none.
    """
    from digit.core.errors import DigitError
    from digit.evaluation.metrics.fidelity import METRICS, FidelityOptions

    chosen = tuple(part.strip() for part in metrics.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(METRICS):
        raise DigitError(f"--metrics {metrics} was given; expected some of {', '.join(METRICS)}.")
    return FidelityOptions(metrics=chosen, batch_size=batch_size)


def open_reference(
    reference: str, split: str | None, options: FidelityOptions, weights: str, backend: str, device: str | None
) -> Reference:
    """The real images, measured now."""
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.studies.points import Reference

    return Reference.of(reference, open_extractor(weights, backend, str(pick_device(device))), options, split)


def reconstruction(
    model: RequiredModel,
    data: Data,
    split: Split = "test",
    num: Num = None,
    rfid: Annotated[bool, typer.Option(help="Measure FID against the originals.")] = True,
    lpips: Annotated[str, typer.Option(help="Backbone of LPIPS: alex or vgg; none leaves it out.")] = "alex",
    lpips_weights: Annotated[str, typer.Option(help="Weights of the backbone: auto or a file.")] = "auto",
    perturb: Annotated[bool, typer.Option("--perturb", help="Also the FID under perturbed tokens (pFID).")] = False,
    shares: Annotated[
        str | None, typer.Option(help="For --perturb: shares of replaced tokens, comma separated.")
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    weights: Weights = "auto",
    backend: Backend = "auto",
    out: Out = Path("reconstruction"),
    device: Device = None,
    variant: Variant = None,
) -> None:
    """How well real images come back, through the VQGAN and through semantic tokens and each decoder (ceilings of tables 3
    and 4): rFID, PSNR, SSIM, LPIPS, use of the codebook and entropy of the tokens.

    Example:  digit evaluate reconstruction cifar10 --data data/cifar10 --num 2000 --out runs/reconstruction
    """
    from digit.evaluation.metrics.model_reconstruction import SHARES, model_reconstruction
    from digit.evaluation.model_source import open_images

    images, pipe = open_images(data, split, num), load(model, device, variant=variant)
    networks = _networks(rfid, lpips, lpips_weights, weights, backend, str(pipe.device))
    chosen = SHARES if shares is None else numbers(shares, "--shares")
    result = model_reconstruction(pipe, images, *networks, perturb, chosen, seed=seed, batch_size=batch_size)
    save_and_show(result, out)


def _networks(
    rfid: bool, lpips: str, lpips_weights: str, weights: str, backend: str, device: str
) -> tuple[Any, Any, dict[str, str]]:
    """The networks of rFID and LPIPS; where one cannot be had, None and the reason, for the other values are still
    worth it.
    """
    from digit.core.errors import DigitError
    from digit.evaluation.metrics.inception import open_extractor
    from digit.models.lpips import load_lpips

    extractor, distance, reasons = None, None, {}
    if rfid:
        try:
            extractor = open_extractor(weights, backend, device)
        except DigitError as error:
            reasons["rfid"] = str(error)
    if lpips != "none":
        try:
            distance = load_lpips(lpips, lpips_weights, device)
        except DigitError as error:
            reasons["lpips"] = str(error)
    left_out = {"rfid": "left out by --no-rfid.", "lpips": "left out by --lpips none."}
    return extractor, distance, {**left_out, **reasons}


def sweep(
    model: RequiredModel,
    reference: RealImages,
    vary: Annotated[
        list[str],
        typer.Option(help="A setting and its values, such as top_k=0,50,200 or decoder_top_p=0.8,1; may be repeated."),
    ],
    num: Images = 1000,
    grid: Annotated[bool, typer.Option("--grid", help="All combinations; else one setting at a time.")] = False,
    fixed: Settings = None,
    metrics: Metrics = "fid,isc,prc",
    reference_split: ReferenceSplit = None,
    labels: Labels = None,
    decoder: Decoder = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    weights: Weights = "auto",
    backend: Backend = "auto",
    out: Out = Path("sweep"),
    device: Device = None,
    variant: Variant = None,
) -> None:
    """Fidelity over top-k, top-p, temperature, guidance, steps (figure 6). Repeat an interrupted command to go on.

    Example:  digit evaluate sweep cifar10 --reference data/cifar10 --vary top_k=0,20,50 --vary decoder_top_p=0.8,1
        --num 1000
    """
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.sweep import parse_axes, parse_settings, planned_runs
    from digit.evaluation.studies.sweep import sweep as measure

    axes, settings = parse_axes(vary), parse_settings(fixed)
    pipe = load(model, device, variant=variant)
    run = SamplingRun(pipe, num, seed, parse_labels(labels, pipe), decoder, batch_size, settings)
    planned_runs(run, axes, grid)  # now, and not after the reference was measured
    options = fidelity_options(metrics, batch_size)
    real = open_reference(reference, reference_split, options, weights, backend, device)
    save_and_show(measure(run, axes, real, out, grid), out)


def prefix(
    model: RequiredModel,
    data: Data,
    baseline: Annotated[
        str | None, typer.Option(help="A second model for comparison, such as one over VQ tokens.")
    ] = None,
    split: Split = "test",
    num: Num = None,
    shares: Annotated[
        str, typer.Option(help="Shares of the tokens that are given, comma separated.")
    ] = "0,0.125,0.25,0.5,0.75,1",
    reference: Annotated[
        str | None, typer.Option(help="Real images or their .npz; those of --data if left out.")
    ] = None,
    reference_split: ReferenceSplit = None,
    fixed: Settings = None,
    metrics: Metrics = "fid,isc",
    decoder: Decoder = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    weights: Weights = "auto",
    backend: Backend = "auto",
    out: Out = Path("prefix"),
    device: Device = None,
) -> None:
    """Fidelity against the length of a given prefix of real tokens (figure 4b). Repeat an interrupted command to go on.

    Example:  digit evaluate prefix cifar10 --baseline runs/vq/model --data data/cifar10 --num 2000 --out runs/prefix
    """
    from digit.evaluation.model_source import open_images
    from digit.evaluation.studies.prefix import as_runs
    from digit.evaluation.studies.prefix import prefix as measure
    from digit.evaluation.studies.sweep import parse_settings

    images, settings = open_images(data, split, num), parse_settings(fixed)
    pipes = [load(name, device) for name in (model, baseline) if name]
    runs = as_runs(pipes, seed=seed, batch_size=batch_size, settings=settings)
    if decoder:  # the first model's; a baseline has none
        first = next(iter(runs))
        runs[first] = replace(runs[first], decoder=decoder)
    options, given = fidelity_options(metrics, batch_size), numbers(shares, "--shares")
    for run in runs.values():
        run.check()  # now, and not after the reference was measured
    source = (data, split) if reference is None else (reference, reference_split)
    real = open_reference(*source, options, weights, backend, device)
    save_and_show(measure(runs, images, real, out, given), out)
