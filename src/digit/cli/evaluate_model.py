"""``digit evaluate stability``, ``probe``, ``screen``, ``tokens`` and ``ablation``: measurements of tokens and of the prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from digit.cli.evaluate import Holdout, TestSplit, save_and_show
from digit.cli.options import (
    BatchSize,
    Data,
    Device,
    Num,
    Out,
    RequiredModel,
    Seed,
    Split,
    Variant,
    Weights,
    load,
    num_option,
    set_option,
)  # fmt: skip

if TYPE_CHECKING:
    from digit.data.dataset import ImageDataset


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    from digit.cli import evaluate_images, evaluate_studies

    for command in (stability, probe, screen, tokens, ablation):
        app.command()(command)
    evaluate_images.add_to(app)
    evaluate_studies.add_to(app)


def numbers(text: str, option: str) -> list[float]:
    """Comma separated numbers.

    Raises:
        DigitError: something else.
    """
    from digit.core.errors import DigitError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise DigitError(f"{option} {text} was given; expected numbers separated by commas, such as 0.5,1.") from error


# ---- tokens ----------------------------------------------------------------------------------------------------------


def stability(
    model: RequiredModel,
    data: Data,
    split: Split = "train",
    num: Num = None,
    snr: Annotated[
        str | None, typer.Option(help="Levels in dB, comma separated; the paper's eight if left out.")
    ] = None,
    signal: Annotated[str, typer.Option(help="Signal power of an image: power (mean square) or variance.")] = "power",
    clip: Annotated[bool, typer.Option(help="Cut noisy pixels back to 0..1.")] = True,
    noise_only: Annotated[bool, typer.Option("--noise-only", help="Leave out JPEG, blur, shift, brightness.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    batch_size: BatchSize = 64,
    out: Out = Path("stability"),
    device: Device = None,
    variant: Variant = None,
) -> None:
    """How much tokens move when pixels hardly do (Table 1): share of changed tokens and cosine, semantic and VQ.

    Example:  digit evaluate stability cifar10 --data data/cifar10 --split test --num 2000 --out runs/stability
    """
    from digit.core.config import from_dict
    from digit.evaluation.metrics.noise import Change, NoiseModel
    from digit.evaluation.metrics.stability import NOISE, OTHERS
    from digit.evaluation.metrics.stability import stability as measure
    from digit.evaluation.model_source import open_images

    law = from_dict(NoiseModel, {"signal": signal, "clip": clip, "seed": seed}, "The noise")
    levels = [Change(kind="noise", level=level) for level in numbers(snr, "--snr")] if snr else NOISE
    images, pipe = open_images(data, split, num), load(model, device, variant=variant)
    save_and_show(measure(pipe, images, (*levels, *(() if noise_only else OTHERS)), law, batch_size), out)


def probe(
    model: RequiredModel,
    data: Data,
    train_split: Annotated[str, typer.Option(help="Split that the classifiers learn from.")] = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Num = None,
    layers: Annotated[
        str, typer.Option(help="paper leaves the last block out, as the authors do; all does not.")
    ] = "paper",
    encoder: Annotated[bool, typer.Option(help="Also probe the encoder's own features, the ceiling.")] = True,
    preset: Annotated[
        str | None, typer.Option(help="Fresh crops and settings of a preset: imagenet256-linear-probe, the authors'.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images; 80, or the preset's.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rates at a batch of 1,024, comma separated; 0.4, or the preset's.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="New random crops in each epoch, as the authors do.")] = False,
    views: Annotated[int, typer.Option(min=0, help="Kept random crops of each training image; 0: its middle.")] = 0,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="Bring features to one scale; not the paper's way.")
    ] = False,
    knn: Annotated[int, typer.Option(min=0, help="Neighbours of the k-NN check; 0 leaves it out.")] = 20,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    out: Out = Path("probe"),
    device: Device = None,
    variant: Variant = None,
) -> None:
    """What each layer of the prior knows about classes (Table 2, figure 3b), by linear classifiers and k-NN.

    Without fresh crops features are kept in --out: another --lr or --epochs costs minutes.

    Example:  digit evaluate probe cifar10 --data data/cifar10 --layers all --lr 0.1,0.4,1.6 --out runs/probe

    Example:  digit evaluate probe runs/prior/model --data imagenet --test-split val --preset imagenet256-linear-probe
    """
    from digit.core.config import from_dict, load_preset
    from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, preset_options
    from digit.evaluation.metrics.probe import probe as measure
    from digit.evaluation.model_source import open_images

    train, test = train_and_test(open_images(data, train_split, num), data, test_split, holdout)
    given: dict[str, Any] = {"standardize": standardize, "neighbours": knn, "seed": seed}
    given |= preset_options(load_preset(preset), train) if preset else {}
    given |= {"epochs": epochs} if epochs else {}
    given |= {"lrs": numbers(lr, "--lr")} if lr else {}
    options = from_dict(ProbeOptions, given, "The probe")
    images = ProbeData(train, test, views, seed, batch_size, out, fresh or preset is not None)
    save_and_show(measure(load(model, device, variant=variant), images, out, options, layers, encoder), out)


def train_and_test(
    train: ImageDataset, data: str, test_split: str, holdout: float, num: int | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """The images to learn from and those to be judged on, ``num`` of a test split."""
    from digit.core.errors import DigitError
    from digit.evaluation.metrics.probe import split_off
    from digit.evaluation.model_source import open_images

    if holdout:
        return split_off(train, holdout)
    try:
        return train, open_images(data, test_split, num)
    except DigitError as error:
        raise DigitError(f"{error} To judge on a part of the training images instead, give --holdout 0.2.") from error


# ---- ablations -------------------------------------------------------------------------------------------------------


def screen(
    models: Annotated[
        list[str], typer.Argument(help="Models with encoder and codebook, or with a VQGAN; prior not needed.")
    ],
    data: Data,
    clusters: Annotated[
        str | None, typer.Option(help="Fit codebooks of these sizes for each encoder, such as 64,256.")
    ] = None,
    split: Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Num = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the short training.")] = 300,
    dim: Annotated[int, typer.Option(min=8, help="Width of the small prior.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Its blocks.")] = 4,
    seed: Seed = 0,
    out: Out = Path("screen"),
    device: Device = None,
) -> None:
    """Rank tokens (codebook sizes, encoders, layers) by a short training of a small prior, before training for days.

    Example:  digit evaluate screen runs/conv/model runs/vit/model --clusters 64,256,1024 --data data/cifar10 --out
        runs/screen
    """
    from digit.core.config import from_dict
    from digit.evaluation.model_source import open_images
    from digit.evaluation.studies.ranking import RankingOptions, candidates, rank
    from digit.evaluation.studies.stages import Stages

    heads = max(1, dim // 32)
    given = {"steps": steps, "dim": dim, "depth": depth, "heads": heads if dim % heads == 0 else 1, "seed": seed}
    options = from_dict(RankingOptions, given, "The ranking")
    train, test = train_and_test(open_images(data, split, num), data, test_split, holdout)
    stages = Stages(out, train, test, seed=seed, given_device=device)
    sizes = [int(number) for number in numbers(clusters, "--clusters")] if clusters else []
    pipes = {_short(name, models): load(name, device) for name in models}
    save_and_show(rank(candidates(pipes, sizes, stages), stages, options), out)


def tokens(
    models: Annotated[list[str], typer.Argument(help="Models with encoder and codebook, or with a VQGAN.")],
    data: Data,
    clusters: Annotated[
        str | None, typer.Option(help="Fit codebooks of these sizes for each encoder, such as 256,1024.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Ways to fit them, some of kmeans,spherical,pca,residual,fsq; with --clusters.")
    ] = "kmeans",
    depth: Annotated[int, typer.Option(min=1, help="Tokens a place of kind residual.")] = 4,
    split: Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Num = None,
    test_num: Annotated[int | None, typer.Option(min=2, help="How many images to measure on; all if left out.")] = None,
    seed: Seed = 0,
    out: Out = Path("tokens"),
    device: Device = None,
) -> None:
    """Rank tokens without training: use, entropy, stability, neighbours, and what ridge regression decodes for the bits.

    Example:  digit evaluate tokens cifar10 --data data/cifar10 --kinds kmeans,spherical,pca,residual,fsq
        --clusters 256,1024 --num 4000 --test-num 1000 --out runs/tokens
    """
    from digit.clustering.discretisers import Discretisation
    from digit.core.config import from_dict
    from digit.core.errors import DigitError
    from digit.evaluation.model_source import open_images
    from digit.evaluation.studies.ranking import candidates
    from digit.evaluation.studies.stages import Stages
    from digit.evaluation.studies.tokens import rank_tokens

    train, test = train_and_test(open_images(data, split, num), data, test_split, holdout, test_num)
    stages = Stages(out, train, test, seed=seed, given_device=device)
    sizes = [int(number) for number in numbers(clusters, "--clusters")] if clusters else []
    if kinds != "kmeans" and not sizes:
        raise DigitError(
            "--kinds fits codebooks, and their sizes are not said; give --clusters, such as --clusters 256."
        )
    ways = [from_dict(Discretisation, {"kind": kind, "depth": depth}, "--kinds") for kind in kinds.split(",")]
    pipes = {_short(name, models): load(name, device) for name in models}
    save_and_show(rank_tokens(candidates(pipes, sizes, stages, ways), stages), out)


def ablation(
    name: Annotated[str, typer.Argument(help="A packaged ablation, such as cifar10-clusters, or a YAML file.")],
    data: Data,
    split: Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Annotated[int | None, num_option("How many images prior and decoder learn; all if left out.", 2)] = None,
    settings: Annotated[
        list[str] | None, set_option("Change a field of the ablation, such as base.prior_set=[training.steps=50]")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Some of nll (held-out loss), probe, fid.")] = "nll,probe,fid",
    reference: Annotated[
        str | None, typer.Option(help="For FID: images or their .npz; the test images if left out.")
    ] = None,
    weights: Weights = "auto",
    out: Out = Path("ablation"),
    device: Device = None,
) -> None:
    """Vary one thing (K, encoder, layer, decoder, size of the prior), share the rest, train and measure: figures 3a,
    3b, 4a.

    Repeat an interrupted command to go on; what is finished is not done again.

    Example:  digit evaluate ablation cifar10-clusters --data data/cifar10 --num 10000 --out runs/clusters

    Example:  digit evaluate ablation cifar10-encoder --data data/cifar10 --num 10000 --metrics nll,probe --out
        runs/encoders
    """
    from digit.evaluation.model_source import open_images
    from digit.evaluation.studies.ablation import load_ablation, run_ablation
    from digit.training.loop import Interrupted

    chosen = load_ablation(name, settings or [])
    train, test = train_and_test(open_images(data, split, num), data, test_split, holdout)
    asked = [part.strip() for part in metrics.split(",") if part.strip()]
    try:
        result = run_ablation(chosen, data, train, test, out, asked, reference, weights, device)
    except Interrupted as stop:
        typer.echo(f"{stop} The same command goes on.", err=True)
        raise typer.Exit(stop.exit_code) from None
    save_and_show(result, out)


def _short(name: str, models: Sequence[str]) -> str:
    """As much of a path as tells it from the others: "conv" of runs/conv/model, unless another ends the same way."""
    parts = [part for part in Path(name).parts if part not in ("model", "/")]
    others = [[p for p in Path(m).parts if p not in ("model", "/")] for m in models if m != name]
    for count in range(1, len(parts) + 1):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return name
