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
from digit.cli.options import argument, option
from digit.core.errors import DigitError

if TYPE_CHECKING:
    from digit.data.dataset import ImageDataset
    from digit.evaluation.studies.stages import Stages
    from digit.pipeline.pipeline import DigitPipeline


def stability(
    model: options.RequiredModel,
    data: options.Data,
    split: options.Split = "train",
    num: options.Num = None,
    snr: Annotated[str | None, option("Levels in dB, comma separated; the paper's eight if left out.")] = None,
    signal: Annotated[str, option("Signal power of an image: power (mean square) or variance.")] = "power",
    clip: Annotated[bool, option("Cut noisy pixels back to 0..1.")] = True,
    noise_only: Annotated[bool, option("Leave out JPEG, blur, shift, brightness.", "--noise-only")] = False,
    seed: Annotated[int, option("Of the noise.", min=0)] = 0,
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
    from digit.evaluation.metrics.stability import NOISE, OTHERS, stability
    from digit.evaluation.model_source import open_images

    law = from_dict(NoiseModel, {"signal": signal, "clip": clip, "seed": seed}, "The noise")
    levels = [Change(kind="noise", level=level) for level in options.numbers(snr, "--snr")] if snr else NOISE
    images, pipe = open_images(data, split, num), options.load(model, device, variant=variant)
    stability(pipe, images, (*levels, *(() if noise_only else OTHERS)), law, batch_size).save(out).show(out)


def probe(
    model: options.RequiredModel,
    data: options.Data,
    train_split: Annotated[str, option("Split that the classifiers learn from.")] = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
    layers: Annotated[str, option("paper leaves the last block out, as the authors do; all does not.")] = "paper",
    encoder: Annotated[bool, option("Also probe the encoder's own features, the ceiling.")] = True,
    preset: Annotated[str | None, option("Fresh crops and settings of a preset: imagenet256-linear-probe.")] = None,
    epochs: Annotated[int | None, option("Passes over the images; 80, or the preset's.", min=1)] = None,
    lr: Annotated[str | None, option("Learning rates at batch 1,024, comma separated; 0.4, or the preset's.")] = None,
    fresh: Annotated[bool, option("New random crops in each epoch, as the authors do.", "--fresh")] = False,
    views: Annotated[int, option("Kept random crops of each training image; 0: its middle.", min=0)] = 0,
    standardize: Annotated[bool, option("Bring features to one scale; not the paper's way.", "--standardize")] = False,
    knn: Annotated[int, option("Neighbours of the k-NN check; 0 leaves it out.", min=0)] = 20,
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
    from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, preset_options, probe

    train, test = _train_and_test(data, train_split, num, test_split, holdout)
    given: dict[str, Any] = {"standardize": standardize, "neighbours": knn, "seed": seed}
    given |= preset_options(load_preset(preset), train) if preset else {}
    given |= {"epochs": epochs} if epochs else {}
    given |= {"lrs": options.numbers(lr, "--lr")} if lr else {}
    how = from_dict(ProbeOptions, given, "The probe")
    images = ProbeData(train, test, views, seed, batch_size, out, fresh or preset is not None)
    probe(options.load(model, device, variant=variant), images, out, how, layers, encoder).save(out).show(out)


def _train_and_test(
    data: str, split: str, num: int | None, test_split: str, holdout: float, test_num: int | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """The images to learn from and those to measure on."""
    from digit.evaluation.metrics.probe import split_off
    from digit.evaluation.model_source import open_images

    train = open_images(data, split, num)
    if holdout:
        return split_off(train, holdout)
    try:
        return train, open_images(data, test_split, test_num)
    except DigitError as error:
        raise DigitError(f"{error} To measure on a part of the training images, give --holdout 0.2.") from error


def _candidates(
    models: Sequence[str], clusters: str | None, stages: Stages, kinds: Sequence[str] = ("kmeans",), depth: int = 4
) -> dict[str, DigitPipeline]:
    """The tokenizers of some models, each by as much of its path as tells it from the others ("conv" of
    runs/conv/model), with codebooks of each kind and size fitted where asked.
    """
    from digit.clustering.discretisers import Discretisation
    from digit.core.config import from_dict
    from digit.evaluation.studies.ranking import candidates

    sizes = [int(number) for number in options.numbers(clusters, "--clusters")] if clusters else []
    ways = [from_dict(Discretisation, {"kind": kind, "depth": depth}, "--kinds") for kind in kinds]
    paths = {name: [part for part in Path(name).parts if part not in ("model", "/")] for name in models}
    pipes = {}
    for name, parts in paths.items():
        ends = ["/".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = ["/" + "/".join(other) for model, other in paths.items() if model != name]
        short = next((end for end in ends if not any(other.endswith(f"/{end}") for other in others)), name)
        pipes[short] = options.load(name, stages.given_device)
    return candidates(pipes, sizes, stages, ways)


def screen(
    models: Annotated[list[str], argument("Models with encoder and codebook, or with a VQGAN; prior not needed.")],
    data: options.Data,
    clusters: Annotated[str | None, option("Fit codebooks of these sizes for each encoder, such as 64,256.")] = None,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
    steps: Annotated[int, option("Of the short training.", min=1)] = 300,
    dim: Annotated[int, option("Width of the small prior.", min=8)] = 128,
    depth: Annotated[int, option("Its blocks.", min=1)] = 4,
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
    models: Annotated[list[str], argument("Models with encoder and codebook, or with a VQGAN.")],
    data: options.Data,
    clusters: Annotated[str | None, option("Fit codebooks of these sizes for each encoder, such as 256,1024.")] = None,
    kinds: Annotated[str, option("Ways to fit them: kmeans,spherical,pca,residual,fsq; with --clusters.")] = "kmeans",
    depth: Annotated[int, option("Tokens a place of kind residual.", min=1)] = 4,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: options.Num = None,
    test_num: Annotated[int | None, option("How many images to measure on; all if left out.", min=2)] = None,
    seed: options.Seed = 0,
    out: options.Out = Path("tokens"),
    device: options.Device = None,
) -> None:
    """Rank tokens without training: use, entropy, stability, neighbours, and what ridge regression decodes for the
    bits.

    Example:  digit evaluate tokens cifar10 --data data/cifar10 --kinds kmeans,spherical,pca,residual,fsq
        --clusters 256,1024 --num 4000 --test-num 1000 --out runs/tokens
    """
    from digit.evaluation.studies.ranking import rank_tokens
    from digit.evaluation.studies.stages import Stages

    if kinds != "kmeans" and not clusters:
        raise DigitError("--kinds fits codebooks, and their sizes are not said; give --clusters, such as 256.")
    train, test = _train_and_test(data, split, num, test_split, holdout, test_num)
    stages = Stages(out, train, test, seed=seed, given_device=device)
    candidates = _candidates(models, clusters, stages, kinds.split(","), depth)
    rank_tokens(candidates, stages).save(out).show(out)


def ablation(
    name: Annotated[str, argument("A packaged ablation, such as cifar10-clusters, or a YAML file.")],
    data: options.Data,
    split: options.Split = "train",
    test_split: TestSplit = "test",
    holdout: Holdout = 0.0,
    num: Annotated[int | None, options.num("How many images prior and decoder learn; all if left out.", 2)] = None,
    settings: Annotated[
        list[str] | None, options.changes("Change a field of the ablation, such as base.prior_set=[training.steps=50]")
    ] = None,
    metrics: Annotated[str, option("Some of nll (held-out loss), probe, fid.")] = "nll,probe,fid",
    reference: Annotated[str | None, option("For FID: images or their .npz; the test images if left out.")] = None,
    weights: options.Weights = "auto",
    out: options.Out = Path("ablation"),
    device: options.Device = None,
) -> None:
    """Vary one thing (K, encoder, layer, decoder, size of the prior), share the rest, train and measure: figures 3a,
    3b, 4a.

    Repeat an interrupted command to go on; what is finished is not done again.

    Example:  digit evaluate ablation cifar10-clusters --data data/cifar10 --num 10000 --out runs/clusters
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
