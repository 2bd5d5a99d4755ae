"""``digit evaluate``: measurements, each a few lines over :mod:`digit.evaluation`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from digit.cli.options import Backend, BatchSize, Decoder, Device, Weights, num_option, out_option, set_option
from digit.core.files import write_json

if TYPE_CHECKING:
    from digit.evaluation.model_source import SamplingRun

app = typer.Typer(no_args_is_help=True, help="Measure generated images, tokens and models.")

Out = Annotated[Path | None, out_option("Write the whole result here as JSON.")]


@app.command()
def fidelity(
    source: Annotated[
        str, typer.Argument(help="A folder of images, tar shards, a data set, a .npz of statistics, or a model.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="The real images or their .npz; none measures only --isc.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the source, such as test.")] = None,
    reference_split: Annotated[str | None, typer.Option(help="Split of the reference.")] = None,
    fid: Annotated[bool, typer.Option(help="Frechet Inception Distance.")] = True,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel Inception Distance.")] = False,
    prc: Annotated[bool, typer.Option("--prc", help="Precision and recall.")] = False,
    isc: Annotated[bool, typer.Option("--isc", help="Inception Score.")] = False,
    num: Annotated[int | None, num_option("Take at most so many images; a model generates as many.", 2)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a model's generation.")] = 0,
    decoder: Decoder = None,
    settings: Annotated[list[str] | None, set_option("A model's sampling setting, such as top_k=200")] = None,
    batch_size: BatchSize = 64,
    kid_subset_size: Annotated[int, typer.Option(min=2, help="Images in each of KID's 100 subsets.")] = 1000,
    weights: Weights = "auto",
    backend: Backend = "auto",
    device: Device = None,
    out: Out = None,
) -> None:
    """Compare images with a reference: FID, KID, precision and recall, Inception Score.

    A model is measured straight from sampling, all classes in turns, without writing files:

      digit evaluate fidelity cifar10 --num 10000 --reference data/cifar10 --set top_k=50
    """
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.features import is_statistics
    from digit.evaluation.metrics.fidelity import FidelityOptions
    from digit.evaluation.metrics.fidelity import fidelity as measure_fidelity
    from digit.evaluation.metrics.inception import open_extractor
    from digit.pipeline.card import describe_model

    wanted = {"fid": fid and reference is not None, "kid": kid, "prc": prc, "isc": isc}
    options = FidelityOptions(
        metrics=tuple(name for name, on in wanted.items() if on), batch_size=batch_size, kid_subset_size=kid_subset_size
    )
    saved = is_statistics(source) and is_statistics(reference)
    run = _sampling_run(source, num, seed, decoder, settings, batch_size, device)
    result = measure_fidelity(
        run.batches() if run else source,
        reference,
        extractor=None if saved else open_extractor(weights, backend, str(pick_device(device))),
        options=options,
        source_name=run.pipe.name if run else None,
        source_split=split,
        reference_split=reference_split,
        total=num,
    )
    if run:
        result = replace(result, model=describe_model(run.pipe), sampling=run.describe())
    result.show()
    if out is not None:
        typer.echo(f"Written to {write_json(out, result.to_dict())}")


def _sampling_run(
    source: str,
    num: int | None,
    seed: int,
    decoder: str | None,
    settings: list[str] | None,
    batch_size: int,
    device: str | None,
) -> SamplingRun | None:
    """A run of generation where the source is a model: a folder, or the name of a packaged one."""
    from digit.core.errors import DigitError
    from digit.core.hub import INDEX, packaged_models

    if not (Path(source) / INDEX).is_file() and source not in packaged_models():
        if decoder or settings:
            raise DigitError(f"--decoder and --set are for models, and {source} is none: there is no {INDEX} in it.")
        return None
    if num is None:
        raise DigitError("How many images the model should generate is not said; give --num, such as --num 10000.")
    from digit.cli.options import load
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.sweep import parse_settings

    run = SamplingRun(load(source, device), num, seed, None, decoder, batch_size, parse_settings(settings))
    run.check()
    return run


@app.command()
def statistics(
    images: Annotated[str, typer.Argument(help="A folder of images, tar shards or a data set.")],
    out: Annotated[Path, out_option("The .npz to write.")],
    split: Annotated[str | None, typer.Option(help="Split of a data set, such as train.")] = None,
    num: Annotated[int | None, num_option("Take at most so many images.", 2)] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Keep every image's features, which KID and --prc need: 8 KB an image.")
    ] = False,
    batch_size: BatchSize = 64,
    weights: Weights = "auto",
    backend: Backend = "auto",
    device: Device = None,
) -> None:
    """Make a reference: the Inception statistics of real images, as a file for --reference.

    Example:  digit evaluate statistics data/cifar10 --split train --num 10000 --features --out real.npz
    """
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.features import measure
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.metrics.statistics import save_statistics

    extractor, metrics = (
        open_extractor(weights, backend, str(pick_device(device))),
        ("fid", *(["kid"] if features else [])),
    )
    found = measure(images, extractor, metrics, batch_size=batch_size, split=split, total=num)
    save_statistics(out, found.statistics, found.features)
    typer.echo(f"Statistics of {found.statistics.n:,} images written to {out}")
