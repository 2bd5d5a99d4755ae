"""``fit-codebook``, ``cache-tokens`` and ``train``: from images to trained parts."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from digit.cli.options import (
    BatchSize,
    Data,
    Device,
    Split,
    Workers,
    complete_presets,
    out_option,
    set_option,
)


class Component(str, Enum):
    """What can be trained."""

    encoder = "encoder"
    vqgan = "vqgan"
    prior = "prior"
    decoder = "decoder"


class FitMode(str, Enum):
    """What k-means runs over."""

    sample = "sample"
    whole = "whole"
    mini_batch = "mini-batch"


class FitStart(str, Enum):
    """Where k-means begins."""

    plus = "k-means++"
    random = "random"


class Crop(str, Enum):
    """How random cuts are made."""

    random = "random"
    random_resized = "random-resized"


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command(name="fit-codebook")(fit_codebook)
    app.command(name="cache-tokens")(cache_tokens)
    app.command()(train)


def fit_codebook(
    encoder: Annotated[
        str, typer.Option("--encoder", help="A folder (a training run too), a checkpoint file, or a Hub id.")
    ],
    data: Data,
    clusters: Annotated[int, typer.Option("--clusters", "-k", min=1, help="Tokens in the vocabulary, K.")],
    out: Annotated[Path, out_option("The codebook folder to write.")],
    split: Split = "train",
    images: Annotated[int | None, typer.Option(min=1, help="Use this many random images; all if left out.")] = None,
    random_crops: Annotated[
        bool,
        typer.Option(
            "--random-crops", help="Cut images anywhere and mirror half of them, as the paper did; else the middle."
        ),
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Of k-means; the paper: 20.")] = 20,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the choice of images and vectors, and of the first centroids.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at a time; changes the result of mini-batches only.")
    ] = 64,
    backend: Annotated[  # noqa: ARG001
        str | None, typer.Option(hidden=True, help="Of the first edition; torch computes k-means.")
    ] = None,
    mode: Annotated[
        FitMode,
        typer.Option(
            help="sample: of 256 vectors a token. whole: each iteration reads all images again. mini-batch: so it does, "
            "and the centroids move after every batch."
        ),
    ] = FitMode.sample,
    start: Annotated[
        FitStart, typer.Option(help="First centroids: random vectors, as in the paper; k-means++ takes K squared time.")
    ] = FitStart.random,
    workers: Workers = 2,
    device: Device = None,
) -> None:
    """Fit the codebook of semantic tokens: k-means over an encoder's patch features.

    Example:  digit fit-codebook --encoder runs/encoder --data data/cifar10 --clusters 256 --out runs/codebook

    Example:  digit fit-codebook --encoder facebook/dinov2-with-registers-base --data data/photos -k 8192 --out codebook

    On several GPUs:  torchrun --nproc_per_node 8 -m digit fit-codebook --mode whole --encoder ... --out
        codebook
    """
    import numpy as np

    from digit.clustering.kmeans import fit_codebook as fit
    from digit.clustering.streams import PassSampler, process_group
    from digit.core.devices import pick_device
    from digit.core.transforms import Transform
    from digit.data.dataset import open_dataset
    from digit.data.sampling import Batches
    from digit.encoders import load_encoder
    from digit.pipeline.assembly import part_folder

    where = pick_device(device)
    dataset = open_dataset(data, split)
    if images is not None and images < len(dataset):
        dataset = dataset.subset(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:images]))
    network: Any = load_encoder(part_folder(encoder) if Path(encoder, "model").is_dir() else encoder)
    transform = Transform(
        size=network.preprocessing.image_size, crop="random" if random_crops else "center", flip=random_crops
    )
    facts = {"data": {"name": dataset.name, "split": split, "images": len(dataset), "fingerprint": dataset.fingerprint}}
    with process_group(where) as (rank, world, place):

        def passes(number: int) -> Batches:
            sampler = PassSampler(len(dataset), batch_size, seed, number, rank, world)
            return Batches(dataset, sampler, transform, seed=seed, workers=workers)

        codebook = fit(
            network, passes, clusters, mode=mode.value, start=start.value, seed=seed, iterations=iterations, device=place,
            total=len(dataset), provenance=facts, show=rank == 0,
        )  # fmt: skip
    if rank:
        return
    codebook.save_pretrained(out)
    typer.echo(f"A codebook of {clusters:,} tokens from {len(dataset):,} images: {out}")


def cache_tokens(
    model: Annotated[
        str, typer.Option("--model", help="A model with encoder and codebook, a VQGAN, or all; see digit assemble.")
    ],
    data: Data,
    out: Annotated[Path, out_option("The cache folder; one that was begun is finished.")],
    split: Split = "train",
    flip: Annotated[bool, typer.Option(help="Cache the mirror image of the middle too.")] = True,
    crops: Annotated[
        int, typer.Option(min=0, help="Random cuts of each image besides; the paper cut anew in every epoch.")
    ] = 0,
    crop: Annotated[Crop, typer.Option(help="random: anywhere. random-resized: of varying size too.")] = Crop.random,
    seed: Annotated[int, typer.Option(min=0, help="Of the random cuts.")] = 0,
    batch_size: BatchSize = 64,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images a shard; a shard is written whole or not at all.")
    ] = 8192,
    workers: Workers = 2,
    device: Device = None,
) -> None:
    """Tokenize a dataset once, so that training reads integers only. Interrupted, the same command goes on.

    Several processes share the work when they are started by torchrun or accelerate launch.

    Example:  digit cache-tokens --model runs/tokenizers --data data/cifar10 --out runs/tokens

    Example:  digit cache-tokens --model runs/tokenizers --data data/photos --crops 8 --device cuda --out runs/tokens
    """
    from digit.cli.options import load
    from digit.data.dataset import open_dataset
    from digit.data.token_cache import Views, build_token_cache

    cache = build_token_cache(
        load(model, device),
        open_dataset(data, split),
        out,
        Views(flip=flip, crops=crops, crop=crop.value, seed=seed),
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        rank=_rank(),
        world=int(os.environ.get("WORLD_SIZE", "1")),
    )
    if cache is None:
        typer.echo(f"This process has made its shards; others are still at work: {out}")
    else:
        kinds = ", ".join(
            f"{space.length} {kind} tokens of {space.vocab_size:,}" for kind, space in cache.spaces.items()
        )
        typer.echo(f"{len(cache):,} images in {len(cache.views)} views ({', '.join(cache.views)}), each {kinds}: {out}")


def train(
    component: Annotated[Component, typer.Argument(help="What to train.")],
    preset: Annotated[
        str, typer.Option("--preset", "-p", autocompletion=complete_presets, help="Name of a preset, or a YAML file.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="Encoder, VQGAN, one-pass decoder: a dataset. Others: a token cache.")
    ],
    out: Annotated[Path, out_option("The run's folder: config, checkpoints, metrics, and the model.")],
    settings: Annotated[
        list[str] | None,
        set_option("Change a field of the preset, such as training.steps=1000"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model whose VQGAN shows samples; a one-pass decoder is trained on its tokens."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Go on from a saved part of the kind, given it, its run, or a whole model."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            help="With --from, what stays as it is: embeddings, classes, blocks, blocks:N (the first N), head; of a VQGAN, tokens."
        ),
    ] = None,
    lora: Annotated[
        int,
        typer.Option(min=0, help="With --from, train changes of this rank instead of the weights (LoRA); 0 is off."),
    ] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Data loading threads; default: the preset's.")] = None,
    device: Device = None,
) -> None:
    """Train a part of the pipeline. Ctrl-C or SIGTERM saves a checkpoint; the same command with --resume then goes on
    exactly.

    Example:  digit train prior --preset cifar10-tiny-prior --data runs/tokens --out runs/prior

    Example:  digit train decoder --preset cifar10-tiny-masked --set training.steps=2000 --data runs/tokens --out
        runs/decoder

    Example:  digit train decoder --preset cifar10-onepass --data data/cifar10 --model runs/tokenizers --out
        runs/onepass

    Example:  digit train prior --from runs/prior --preset cifar10-tiny-prior-cond --data my-tokens --lora 8 --out
        runs/mine

    On several GPUs:  accelerate launch --num_processes 8 -m digit train prior --preset ... --data ... --out ...
    """
    from digit.core.config import load_preset
    from digit.core.errors import DigitError
    from digit.training.build import build_task
    from digit.training.finetune import FineTune
    from digit.training.loop import Interrupted
    from digit.training.loop import train as run

    changes = [*(settings or []), *([] if workers is None else [f"training.workers={workers}"])]
    if start is None and (freeze or lora):
        raise DigitError("--freeze and --lora change how a saved model is trained; give it with --from.")
    origin = None if start is None else FineTune(source=start, freeze=tuple(freeze or ()), lora=lora)
    parts = vqgan = None
    if model is not None:
        from digit.pipeline.pipeline import DigitPipeline

        parts = DigitPipeline.from_pretrained(model)
        vqgan = parts.vqgan
    task, config = build_task(component.value, load_preset(preset, changes), data, preset, vqgan, origin, parts)
    try:
        folder = run(task, config, out, resume=resume, device=device)
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(stop.exit_code) from None
    if _rank() == 0:
        typer.echo(f"Trained: {folder}")
        typer.echo(f"The metrics are in {out / 'metrics.jsonl'}; watch them with: tensorboard --logdir {out}")


def _rank() -> int:
    """Number of this process, as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", "0"))
