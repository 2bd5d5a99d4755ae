"""``digit evaluate reconstruction``, ``sweep``, ``prefix`` and ``robustness``: measurements of the images that a model
makes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from digit.cli import options
from digit.cli.evaluate import Settings
from digit.cli.options import option
from digit.core.errors import DigitError

if TYPE_CHECKING:
    from digit.evaluation.studies.points import Reference

Metrics = Annotated[str, option("Comma separated: fid, sfid, kid, prc (precision, recall), isc (Inception Score).")]
ReferenceSplit = Annotated[str | None, option("Split of the reference.")]
Images = Annotated[int, options.num("Images per point.", 2)]
RealImages = Annotated[str, option("The real images, or their .npz of statistics.")]


def _open_reference(
    reference: str, split: str | None, metrics: str, batch_size: int, weights: str, backend: str, device: str | None
) -> Reference:
    """The real images, measured now."""
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.fidelity import METRICS, FidelityOptions
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.studies.points import Reference

    chosen = tuple(part.strip() for part in metrics.split(",") if part.strip())
    if not chosen or not set(chosen) <= set(METRICS):
        raise DigitError(f"--metrics {metrics} was given; expected some of {', '.join(METRICS)}.")
    how = FidelityOptions(metrics=chosen, batch_size=batch_size)
    return Reference.of(reference, open_extractor(weights, backend, str(pick_device(device))), how, split)


def reconstruction(
    model: options.RequiredModel,
    data: options.Data,
    split: options.Split = "test",
    num: options.Num = None,
    rfid: Annotated[bool, option("Measure FID against the originals.")] = True,
    lpips: Annotated[str, option("Backbone of LPIPS: alex or vgg; none leaves it out.")] = "alex",
    lpips_weights: Annotated[str, option("Weights of the backbone: auto or a file.")] = "auto",
    perturb: Annotated[bool, option("Also the FID under perturbed tokens (pFID).", "--perturb")] = False,
    shares: Annotated[str | None, option("For --perturb: shares of replaced tokens, comma separated.")] = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    out: options.Out = Path("reconstruction"),
    device: options.Device = None,
    variant: options.Variant = None,
) -> None:
    """How well real images come back, through the VQGAN and through semantic tokens and each decoder (ceilings of
    tables 3 and 4): rFID, PSNR, SSIM, LPIPS, use of the codebook and entropy of the tokens.

    Example:  digit evaluate reconstruction cifar10 --data data/cifar10 --num 2000 --out runs/reconstruction
    """
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.metrics.reconstruction import SHARES, model_reconstruction
    from digit.evaluation.model_source import open_images
    from digit.models.lpips import load_lpips

    images, pipe = open_images(data, split, num), options.load(model, device, variant=variant)
    place, extractor, distance = str(pipe.device), None, None
    reasons = {"rfid": "left out by --no-rfid.", "lpips": "left out by --lpips none."}
    try:
        extractor = open_extractor(weights, backend, place) if rfid else None
    except DigitError as error:  # the other values are still worth it
        reasons["rfid"] = str(error)
    try:
        distance = load_lpips(lpips, lpips_weights, place) if lpips != "none" else None
    except DigitError as error:
        reasons["lpips"] = str(error)
    chosen = SHARES if shares is None else options.numbers(shares, "--shares")
    result = model_reconstruction(
        pipe, images, extractor, distance, reasons, perturb, chosen, seed=seed, batch_size=batch_size
    )
    result.save(out).show(out)


def sweep(
    model: options.RequiredModel,
    reference: RealImages,
    vary: Annotated[list[str], option("A setting and its values, such as top_k=0,50,200; may be repeated.")],
    num: Images = 1000,
    grid: Annotated[bool, option("All combinations; else one setting at a time.", "--grid")] = False,
    fixed: Settings = None,
    metrics: Metrics = "fid,isc,prc",
    reference_split: ReferenceSplit = None,
    labels: options.Labels = None,
    decoder: options.Decoder = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    out: options.Out = Path("sweep"),
    device: options.Device = None,
    variant: options.Variant = None,
) -> None:
    """Fidelity over top-k, top-p, temperature, guidance, steps (figure 6). Repeat an interrupted command to go on.

    Example:  digit evaluate sweep cifar10 --reference data/cifar10 --vary top_k=0,20,50 --vary decoder_top_p=0.8,1
        --num 1000
    """
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.sweep import parse_axes, parse_settings, planned_runs, sweep

    axes, settings = parse_axes(vary), parse_settings(fixed)
    pipe = options.load(model, device, variant=variant)
    run = SamplingRun(pipe, num, seed, options.parse_labels(labels, pipe), decoder, batch_size, settings)
    planned_runs(run, axes, grid)  # now, and not after the reference was measured
    real = _open_reference(reference, reference_split, metrics, batch_size, weights, backend, device)
    sweep(run, axes, real, out, grid).save(out).show(out)


def prefix(
    model: options.RequiredModel,
    data: options.Data,
    baseline: Annotated[str | None, option("A second model for comparison, such as one over VQ tokens.")] = None,
    split: options.Split = "test",
    num: options.Num = None,
    shares: Annotated[str, option("Shares of the tokens that are given, comma separated.")] = "0,0.125,0.25,0.5,0.75,1",
    reference: Annotated[str | None, option("Real images or their .npz; those of --data if left out.")] = None,
    reference_split: ReferenceSplit = None,
    fixed: Settings = None,
    metrics: Metrics = "fid,isc",
    decoder: options.Decoder = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    out: options.Out = Path("prefix"),
    device: options.Device = None,
) -> None:
    """Fidelity against the length of a given prefix of real tokens (figure 4b). Repeat an interrupted command to go on.

    Example:  digit evaluate prefix cifar10 --baseline runs/vq/model --data data/cifar10 --num 2000 --out runs/prefix
    """
    from digit.evaluation.model_source import open_images
    from digit.evaluation.studies.points import as_runs
    from digit.evaluation.studies.points import prefix as measure
    from digit.evaluation.studies.sweep import parse_settings

    images, settings = open_images(data, split, num), parse_settings(fixed)
    pipes = [options.load(name, device) for name in (model, baseline) if name]
    runs = as_runs(pipes, seed=seed, batch_size=batch_size, settings=settings)
    if decoder:  # the first model's; a baseline has none
        first = next(iter(runs))
        runs[first] = replace(runs[first], decoder=decoder)
    given = options.numbers(shares, "--shares")
    for run in runs.values():
        run.check()  # now, and not after the reference was measured
    source = (data, split) if reference is None else (reference, reference_split)
    real = _open_reference(*source, metrics, batch_size, weights, backend, device)
    measure(runs, images, real, out, given).save(out).show(out)


def robustness(
    model: options.RequiredModel,
    reference: RealImages,
    decoders: Annotated[str | None, option("Kinds, comma separated; all of the model's if left out.")] = None,
    rates: Annotated[str, option("Shares of replaced tokens, comma separated.")] = "0,0.05,0.1,0.2,0.3,0.5",
    num: Images = 1000,
    fixed: Settings = None,
    metrics: Metrics = "fid",
    reference_split: ReferenceSplit = None,
    labels: options.Labels = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    out: options.Out = Path("robustness"),
    device: options.Device = None,
    variant: options.Variant = None,
) -> None:
    """Damaged tokens through each decoder: FID and agreement while semantic tokens are replaced. Repeat an interrupted
    command to go on.

    Example:  digit evaluate robustness cifar10 --num 1000 --reference cifar10-train.npz --out runs/robustness
    """
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.points import robustness as measure
    from digit.evaluation.studies.sweep import parse_settings

    pipe = options.load(model, device, variant=variant)
    run = SamplingRun(pipe, num, seed, options.parse_labels(labels, pipe), None, batch_size, parse_settings(fixed))
    run.check()  # now, and not after the reference was measured
    kinds, shares = decoders.split(",") if decoders else [], options.numbers(rates, "--rates")
    real = _open_reference(reference, reference_split, metrics, batch_size, weights, backend, device)
    measure(run, real, out, kinds, shares).save(out).show(out)
