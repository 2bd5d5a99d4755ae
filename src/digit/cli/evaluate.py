"""``digit evaluate`` of images that are there, the paper's commands, the toy figure, and the report of it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from digit.cli import options
from digit.cli.options import argument, option
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.core.hub import INDEX, packaged_models

TestSplit = Annotated[str, option("Split that the probe is tested on.")]
Holdout = Annotated[float, option("Test on this share of the training split, where there is no other.", min=0, max=1)]
Settings = Annotated[list[str] | None, options.changes("A setting of sampling, such as top_k=200")]


def fidelity(
    source: Annotated[str | None, argument("A folder of images, tar shards, a data set, an .npz, or a model.")] = None,
    images: Annotated[Path | None, option("A .npz of images: FID, sFID, IS, precision and recall, as ADM.")] = None,
    reference: Annotated[str | None, option("The real images, their .npz, or cifar10-train; none: only --isc.")] = None,
    split: Annotated[str | None, option("Split of the source, such as test.")] = None,
    reference_split: Annotated[str | None, option("Split of the reference.")] = None,
    fid: Annotated[bool, option("Frechet Inception Distance.")] = True,
    sfid: Annotated[bool, option("FID of spatial features.", "--sfid")] = False,
    kid: Annotated[bool, option("Kernel Inception Distance.", "--kid")] = False,
    prc: Annotated[bool, option("Precision and recall.", "--prc")] = False,
    isc: Annotated[bool, option("Inception Score.", "--isc")] = False,
    num: Annotated[int | None, options.num("Images of the source at most, or that a model makes.", 2)] = None,
    reference_num: Annotated[int | None, option("At most so many real images, spread over theirs.", min=2)] = None,
    seed: Annotated[int, option("Of a model's generation.", min=0)] = 0,
    labels: options.RunLabels = None,
    labels_per_class: options.LabelsPerClass = None,
    decoder: options.Decoder = None,
    settings: Settings = None,
    batch_size: options.BatchSize = 64,
    kid_subset_size: Annotated[int, option("Images in each of KID's 100 subsets.", min=2)] = 1000,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    device: options.Device = None,
    out: Annotated[Path | None, options.out("Write the whole result here as JSON.")] = None,
) -> None:
    """Compare images with a reference: FID, sFID, KID, precision and recall, Inception Score.

    A model is measured straight from sampling, all classes in turns, without writing files:

      digit evaluate fidelity cifar10 --num 10000 --reference cifar10-train --set top_k=50

      digit evaluate fidelity --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    """
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.features import is_statistics
    from digit.evaluation.metrics.fidelity import FidelityOptions, fidelity
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.model_source import SamplingRun
    from digit.evaluation.studies.sweep import parse_settings
    from digit.pipeline.card import describe_model
    from digit.pipeline.generation import run_labels

    if (source is None) == (images is None):
        raise DigitError("Give what is measured once: a folder, data set or model, or a .npz of images with --images.")
    against, adm = reference is not None, images is not None
    source, run = str(images or source), None
    wanted = {"fid": fid and against, "sfid": sfid or (adm and against), "kid": kid, "prc": prc or (adm and against)}
    metrics = tuple(name for name, on in {**wanted, "isc": isc or adm}.items() if on)
    saved = is_statistics(source, metrics) and (reference is None or is_statistics(reference, metrics))
    if (Path(source) / INDEX).is_file() or source in packaged_models():
        if num is None and labels_per_class is None:
            raise DigitError("How many images the model should generate is not said; give --num, such as --num 10000.")
        pipe = options.load(source, device)
        given = labels if labels == "random" else options.parse_labels(labels, pipe)
        chosen, num, labelling = run_labels(pipe.num_classes, num, given, labels_per_class, seed)
        run = SamplingRun(pipe, num, seed, chosen, decoder, batch_size, parse_settings(settings))
        run.check()
    elif decoder or settings or labels or labels_per_class:
        raise DigitError(
            f"--decoder, --labels and --set are for models, and {source} is none: there is no {INDEX} in it."
        )
    result = fidelity(
        run.batches() if run else source,
        reference,
        extractor=None if saved else open_extractor(weights, backend, str(pick_device(device))),
        options=FidelityOptions(metrics=metrics, batch_size=batch_size, kid_subset_size=kid_subset_size),
        source_name=run.pipe.name if run else None,
        source_split=split,
        total=num,
        reference_split=reference_split,
        reference_total=reference_num,
    )
    if run:
        result = replace(result, model=describe_model(run.pipe), sampling={**run.describe(), "labels": labelling})
    result.show()
    if out is not None:
        typer.echo(f"Written to {write_json(out, result.to_dict())}")


def statistics(
    images: Annotated[str, argument("A folder of images, tar shards, a data set or a .npz of images.")],
    out: Annotated[Path, options.out("The .npz to write.")],
    split: Annotated[str | None, option("Split of a data set, such as train.")] = None,
    num: Annotated[int | None, options.num("Take at most so many images, the first ones.", 2)] = None,
    size: Annotated[int | None, option("Scale the shorter side to this and cut out the middle.", min=1)] = None,
    filter: Annotated[str, option("How --size scales: bicubic, bilinear (the authors'), lanczos or box.")] = "bicubic",
    features: Annotated[bool, option("Keep each image's features (8 KB), for KID and --prc.", "--features")] = False,
    compact: Annotated[bool, option("4 MB in place of 67: FID alone, to 1e-4.", "--compact")] = False,
    batch_size: options.BatchSize = 64,
    weights: options.Weights = "auto",
    backend: options.Backend = "auto",
    device: options.Device = None,
) -> None:
    """Make a reference: the Inception statistics of real images, as a file for --reference.

    Example:  digit evaluate statistics imagenet/val --size 256 --filter bilinear --out val256.npz
    """
    from digit.core.devices import pick_device
    from digit.evaluation.metrics.features import measure
    from digit.evaluation.metrics.inception import open_extractor
    from digit.evaluation.metrics.statistics import save_statistics

    extractor = open_extractor(weights, backend, str(pick_device(device)))
    metrics = ("sfid", "kid") if features else ("sfid",)
    found = measure(images, extractor, metrics, batch_size=batch_size, split=split, total=num, size=size, filter=filter)
    spatial = None if compact else found.spatial
    save_statistics(out, found.statistics, found.features if features else None, spatial, compact)
    typer.echo(f"Statistics of {found.statistics.n:,} images written to {out}")


def paper() -> None:
    """Print the command behind every table, figure and claim of the paper, at its scale and at a small one."""
    from digit.evaluation.paper import claims_table

    typer.echo(claims_table(), nl=False)


def pca_lda(
    out: Annotated[Path, options.out("Folder for pca-lda.png and result.json.")],
    samples: Annotated[int, option("Points a class.", min=2)] = 1000,
    repeats: Annotated[int, option("Fresh draws to average over.", min=1)] = 20,
    seed: Annotated[int, option("Seed of all draws.")] = 0,
) -> None:
    """Draw two overlapping classes and their PCA and LDA projections, and the accuracy of each under growing noise."""
    from digit.evaluation.metrics.toy import ToyConfig, toy

    toy(ToyConfig(samples=samples, repeats=repeats, seed=seed)).save(out).show(out)


def report(
    folders: Annotated[list[Path], argument("Run folders; everything below them is looked at.", metavar="DIR...")],
    out: Annotated[Path, options.out("The HTML page to write.")] = Path("report.html"),
    title: Annotated[str, option("Heading of the page.")] = "digit report",
    curves: Annotated[list[Path] | None, option("A folder with more reference curves; may be repeated.")] = None,
    save_curve: Annotated[Path | None, option("Write the one run under DIR as a reference curve; no page.")] = None,
) -> None:
    """Write one self-contained HTML page: results beside the paper's figures, loss curves, images, settings,
    hardware.

    Example:  digit report runs --out report.html
    """
    from digit.evaluation.report import save_only_run, write_report

    if save_curve is not None:
        typer.echo(f"Reference curve written to {save_only_run(folders, save_curve)}")
        return
    made = write_report(folders, out, title, curves or [])
    for problem in made.problems:
        typer.echo(f"Not readable: {problem.place.rstrip('/')}: {problem.reason}")
    typer.echo(f"{len(made.found)} results in {out} ({out.stat().st_size / 1e6:.1f} MB)")
