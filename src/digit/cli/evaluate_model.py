"""``digit evaluate stability``, ``probe``, ``screen``, ``tokens`` and ``ablation``: measurements of tokens and of the
prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from digit.cli import options
from digit.cli.evaluate import Holdout, TestSplit
from digit.core.errors import DigitError

if TYPE_CHECKING:
    from digit.clustering.discretisers import Discretisation
    from digit.data.dataset import ImageDataset
    from digit.evaluation.studies.stages import Stages
    from digit.pipeline.pipeline import DigitPipeline


def stability(
    model: options.RequiredModel,
    data: options.Data,
    split: options.Split = "train",
    num: options.Num = None,
    snr: Annotated[
        str | None, typer.Option(help="Levels in dB, comma separated; the paper's eight if left out.")
    ] = None,
    signal: Annotated[str, typer.Option(help="Signal power of an image: power (mean square) or variance.")] = "power",
    clip: Annotated[bool, typer.Option(help="Cut noisy pixels back to 0..1.")] = True,
    noise_only: Annotated[bool, typer.Option("--noise-only", help="Leave out JPEG, blur, shift, brightness.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    batch_size: options.BatchSize = 64,
    out: options.Out = Path("stability"),
    device: options.Device = None,
    variant: options.Variant = None,
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
    levels = [Change(kind="noise", level=level) for level in options.numbers(snr, "--snr")] if snr else NOISE
    images, pipe = open_images(data, split, num), options.load(model, device, variant=variant)
    measure(pipe, images, (*levels, *(() if noise_only else OTHERS)), law, batch_size).save(out).show(out)


def probe(
    model: options.RequiredModel,
    data: options.Data,
    train_split: Annotated[str, typer.Option(help="Split that the classifiers learn from.")] = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
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
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 64,
    out: options.Out = Path("probe"),
    device: options.Device = None,
    variant: options.Variant = None,
) -> None:
    """What each layer of the prior knows about classes (Table 2, figure 3b), by linear classifiers and k-NN.

    Without fresh crops features are kept in --out: another --lr or --epochs costs minutes.

    Example:  digit evaluate probe cifar10 --data data/cifar10 --layers all --lr 0.1,0.4,1.6 --out runs/probe

    Example:  digit evaluate probe runs/prior/model --data imagenet --test-split val --preset imagenet256-linear-probe
    """
    from digit.core.config import from_dict, load_preset
    from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, preset_options
    from digit.evaluation.metrics.probe import probe as measure

    train, test = _train_and_test(data, train_split, num, test_split, holdout)
    given: dict[str, Any] = {"standardize": standardize, "neighbours": knn, "seed": seed}
    given |= preset_options(load_preset(preset), train) if preset else {}
    given |= {"epochs": epochs} if epochs else {}
    given |= {"lrs": options.numbers(lr, "--lr")} if lr else {}
    how = from_dict(ProbeOptions, given, "The probe")
    images = ProbeData(train, test, views, seed, batch_size, out, fresh or preset is not None)
    measure(options.load(model, device, variant=variant), images, out, how, layers, encoder).save(out).show(out)


def _train_and_test(
    data: str, split: str, num: int | None, test_split: str, holdout: float, test_num: int | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """The images to learn from and those to be judged on."""
    from digit.evaluation.metrics.probe import split_off
    from digit.evaluation.model_source import open_images

    train = open_images(data, split, num)
    if holdout:
        return split_off(train, holdout)
    try:
        return train, open_images(data, test_split, test_num)
    except DigitError as error:
        raise DigitError(f"{error} To judge on a part of the training images instead, give --holdout 0.2.") from error


def _candidates(
    models: Sequence[str], clusters: str | None, stages: Stages, kinds: Sequence[Discretisation] = ()
) -> dict[str, DigitPipeline]:
    """The tokenizers of some models by their short names, with codebooks of each kind and size fitted where asked."""
    from digit.clustering.discretisers import Discretisation
    from digit.evaluation.studies.ranking import candidates

    sizes = [int(number) for number in options.numbers(clusters, "--clusters")] if clusters else []
    pipes = {_short(name, models): options.load(name, stages.given_device) for name in models}
    return candidates(pipes, sizes, stages, kinds or (Discretisation(),))


def screen(
    models: Annotated[
        list[str], typer.Argument(help="Models with encoder and codebook, or with a VQGAN; prior not needed.")
    ],
    data: options.Data,
    clusters: Annotated[
        str | None, typer.Option(help="Fit codebooks of these sizes for each encoder, such as 64,256.")
    ] = None,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the short training.")] = 300,
    dim: Annotated[int, typer.Option(min=8, help="Width of the small prior.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Its blocks.")] = 4,
    seed: options.Seed = 0,
    out: options.Out = Path("screen"),
    device: options.Device = None,
) -> None:
    """Rank tokens (codebook sizes, encoders, layers) by a short training of a small prior, before training for days.

    Example:  digit evaluate screen runs/conv/model runs/vit/model --clusters 64,256,1024 --data data/cifar10 --out
        runs/screen
    """
    from digit.core.config import from_dict
    from digit.evaluation.studies.ranking import RankingOptions, rank
    from digit.evaluation.studies.stages import Stages

    heads = max(1, dim // 32)
    given = {"steps": steps, "dim": dim, "depth": depth, "heads": heads if dim % heads == 0 else 1, "seed": seed}
    ranking = from_dict(RankingOptions, given, "The ranking")
    train, test = _train_and_test(data, split, num, test_split, holdout)
    stages = Stages(out, train, test, seed=seed, given_device=device)
    rank(_candidates(models, clusters, stages), stages, ranking).save(out).show(out)


def tokens(
    models: Annotated[list[str], typer.Argument(help="Models with encoder and codebook, or with a VQGAN.")],
    data: options.Data,
    clusters: Annotated[
        str | None, typer.Option(help="Fit codebooks of these sizes for each encoder, such as 256,1024.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Ways to fit them, some of kmeans,spherical,pca,residual,fsq; with --clusters.")
    ] = "kmeans",
    depth: Annotated[int, typer.Option(min=1, help="Tokens a place of kind residual.")] = 4,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
    test_num: Annotated[int | None, typer.Option(min=2, help="How many images to measure on; all if left out.")] = None,
    seed: options.Seed = 0,
    out: options.Out = Path("tokens"),
    device: options.Device = None,
) -> None:
    """Rank tokens without training: use, entropy, stability, neighbours, and what ridge regression decodes for the
    bits.

    Example:  digit evaluate tokens cifar10 --data data/cifar10 --kinds kmeans,spherical,pca,residual,fsq
        --clusters 256,1024 --num 4000 --test-num 1000 --out runs/tokens
    """
    from digit.clustering.discretisers import Discretisation
    from digit.core.config import from_dict
    from digit.evaluation.studies.ranking import rank_tokens
    from digit.evaluation.studies.stages import Stages

    if kinds != "kmeans" and not clusters:
        raise DigitError(
            "--kinds fits codebooks, and their sizes are not said; give --clusters, such as --clusters 256."
        )
    train, test = _train_and_test(data, split, num, test_split, holdout, test_num)
    stages = Stages(out, train, test, seed=seed, given_device=device)
    ways = [from_dict(Discretisation, {"kind": kind, "depth": depth}, "--kinds") for kind in kinds.split(",")]
    rank_tokens(_candidates(models, clusters, stages, ways), stages).save(out).show(out)


def ablation(
    name: Annotated[str, typer.Argument(help="A packaged ablation, such as cifar10-clusters, or a YAML file.")],
    data: options.Data,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Annotated[int | None, options.num("How many images prior and decoder learn; all if left out.", 2)] = None,
    settings: Annotated[
        list[str] | None, options.changes("Change a field of the ablation, such as base.prior_set=[training.steps=50]")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Some of nll (held-out loss), probe, fid.")] = "nll,probe,fid",
    reference: Annotated[
        str | None, typer.Option(help="For FID: images or their .npz; the test images if left out.")
    ] = None,
    weights: options.Weights = "auto",
    out: options.Out = Path("ablation"),
    device: options.Device = None,
) -> None:
    """Vary one thing (K, encoder, layer, decoder, size of the prior), share the rest, train and measure: figures 3a,
    3b, 4a.

    Repeat an interrupted command to go on; what is finished is not done again.

    Example:  digit evaluate ablation cifar10-clusters --data data/cifar10 --num 10000 --out runs/clusters

    Example:  digit evaluate ablation cifar10-encoder --data data/cifar10 --num 10000 --metrics nll,probe --out
        runs/encoders
    """
    from digit.evaluation.studies.ablation import load_ablation, run_ablation
    from digit.training.loop import Interrupted

    chosen = load_ablation(name, settings or [])
    train, test = _train_and_test(data, split, num, test_split, holdout)
    asked = [part.strip() for part in metrics.split(",") if part.strip()]
    try:
        result = run_ablation(chosen, data, train, test, out, asked, reference, weights, device)
    except Interrupted as stop:
        typer.echo(f"{stop} The same command goes on.", err=True)
        raise typer.Exit(stop.exit_code) from None
    result.save(out).show(out)


def _short(name: str, models: Sequence[str]) -> str:
    """As much of a path as tells it from the others: "conv" of runs/conv/model, unless another ends the same way."""
    parts = [part for part in Path(name).parts if part not in ("model", "/")]
    others = [[p for p in Path(m).parts if p not in ("model", "/")] for m in models if m != name]
    for count in range(1, len(parts) + 1):
        if all(other[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return name
