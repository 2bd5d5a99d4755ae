"""``fit-codebook``, ``cache-tokens`` and ``train``: from images to trained parts."""

from __future__ import annotations

import os
import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from digit.cli import options
from digit.cli.options import argument, option
from digit.core.errors import DigitError, MissingPackageError

if TYPE_CHECKING:
    from digit.training.build import Request

_NEXT = {
    "encoder": "digit fit-codebook --encoder {out} --data {data} --clusters 256 --out {beside}codebook",
    "vqgan": "digit assemble --encoder ENCODER --codebook CODEBOOK --vqgan {out} --out {beside}tokenizers",
    "codebook": "digit assemble --encoder {encoder} --codebook {out} --vqgan VQGAN --out {beside}tokenizers",
    "prior": "digit assemble --base {model} --prior {out} --out {beside}model",
    "decoder": "digit assemble --base {model} --decoder {out} --out {beside}model",
}


def fit_codebook(
    encoder: Annotated[str, option("A folder (a training run too), a checkpoint file, or a Hub id.")],
    data: options.Data,
    clusters: Annotated[int, option("Tokens in the vocabulary, K.", "--clusters", "-k", min=1)],
    out: Annotated[Path, options.out("The codebook folder to write.")],
    split: options.Split = "train",
    images: Annotated[int | None, option("Use this many random images; all if left out.", min=1)] = None,
    random_crops: Annotated[bool, option("Random crops and flips, as the paper did.", "--random-crops")] = False,
    iterations: Annotated[int, option("Of k-means; the paper: 20.", min=1)] = 20,
    seed: Annotated[int, option("Of the choice of images and vectors, and of the first centroids.", min=0)] = 0,
    batch_size: Annotated[int, option("Images at a time; changes the result of mini-batches only.", min=1)] = 64,
    backend: Annotated[  # noqa: ARG001
        Literal["faiss", "torch"] | None,
        option("Of the first edition, without effect: torch computes k-means.", hidden=True),
    ] = None,
    kind: Annotated[
        Literal["kmeans", "spherical", "pca", "residual", "fsq"],
        option("k-means; of directions, principal components or residuals (several tokens a place); fsq: a grid."),
    ] = "kmeans",
    pca: Annotated[int | None, option("Fit in the space of so many principal components; not for fsq.", min=1)] = None,
    depth: Annotated[int, option("Tokens a place of kind residual.", min=1)] = 4,
    mode: Annotated[
        Literal["sample", "whole", "mini-batch"],
        option("sample: of 256 vectors per token. whole: all images in each iteration. mini-batch: of each batch."),
    ] = "sample",
    start: Annotated[
        Literal["k-means++", "random"], option("First centroids; random as in the paper, k-means++ takes much longer.")
    ] = "random",
    workers: options.Workers = 2,
    device: options.Device = None,
) -> None:
    """Fit the codebook of semantic tokens: k-means over an encoder's patch features.

    Example:  digit fit-codebook --encoder runs/encoder --data data/cifar10 --clusters 256 --out runs/codebook

    Example:  digit fit-codebook --encoder facebook/dinov2-with-registers-base --data data/photos -k 8192 --out codebook

    On several GPUs:  torchrun --nproc_per_node 8 -m digit fit-codebook --mode whole --encoder ... --out
        codebook
    """
    import numpy as np

    from digit.clustering.discretisers import Discretisation
    from digit.clustering.kmeans import fit_codebook
    from digit.clustering.streams import PassSampler, process_group
    from digit.core.devices import pick_device
    from digit.core.transforms import Transform
    from digit.data.dataset import open_dataset
    from digit.data.sampling import Batches
    from digit.encoders import load_encoder
    from digit.evaluation.results import Result, shown
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

        codebook = fit_codebook(
            network, passes, clusters, discretiser=Discretisation(kind=kind, pca=pca, depth=depth), mode=mode,
            start=start,
            seed=seed, iterations=iterations, device=place, total=len(dataset), provenance=facts, show=rank == 0,
        )  # fmt: skip
    if rank:
        return
    codebook.save_pretrained(out)
    made, total = codebook.provenance, len(codebook.centroids)
    rows = [
        {"": "clusters in use", "value": shown(made["used_clusters"]), "at best": total},
        {"": "perplexity", "value": shown(made["perplexity"]), "at best": total},
        {"": "mean squared distance", "value": shown(made["inertia"]), "at best": 0},
    ]
    typer.echo(f"A codebook of {total:,} tokens from {len(dataset):,} images: {out}")
    Result(title="Codebook", values=rows, data=facts["data"]).show()
    typer.echo(f"Next: {_next('codebook', out, encoder=encoder)}")


def cache_tokens(
    model: Annotated[str, option("A model with encoder and codebook, a VQGAN, or all; see digit assemble.")],
    data: options.Data,
    out: Annotated[Path, options.out("The cache folder; one that was begun is finished.")],
    split: options.Split = "train",
    flip: Annotated[bool, option("Cache the horizontal flip of the center crop too.")] = True,
    crops: Annotated[int, option("Random crops of each image besides; the paper: new ones in each epoch.", min=0)] = 0,
    crop: Annotated[Literal["random", "random-resized"], option("random-resized: of varying size too.")] = "random",
    seed: Annotated[int, option("Of the random crops.", min=0)] = 0,
    batch_size: options.BatchSize = 64,
    shard_size: Annotated[int, option("Images per shard; a shard is written whole or not at all.", min=1)] = 8192,
    workers: options.Workers = 2,
    device: options.Device = None,
) -> None:
    """Tokenize a dataset once, so that training reads integers only. Interrupted, the same command goes on.

    Several processes share the work when they are started by torchrun or accelerate launch.

    Example:  digit cache-tokens --model runs/tokenizers --data data/photos --crops 8 --device cuda --out runs/tokens
    """
    from digit.data.dataset import open_dataset
    from digit.data.token_cache import Views, build_token_cache

    views = Views(flip=flip, crops=crops, crop=crop, seed=seed)
    (rank, world), pipe, images = _process(), options.load(model, device), open_dataset(data, split)
    how = {"batch_size": batch_size, "shard_size": shard_size, "workers": workers, "rank": rank, "world": world}
    cache = build_token_cache(pipe, images, out, views, **how)
    if cache is None:
        typer.echo(f"This process has made its shards; others are still at work: {out}")
    else:
        kinds = ", ".join(
            f"{space.length} {kind} tokens of {space.vocab_size:,}" for kind, space in cache.spaces.items()
        )
        typer.echo(f"{len(cache):,} images in {len(cache.views)} views ({', '.join(cache.views)}), each {kinds}: {out}")


def train(
    component: Annotated[Literal["encoder", "vqgan", "prior", "decoder"], argument("What to train.")],
    out: Annotated[Path, options.out("The run's folder: config, checkpoints, metrics, and the model.")],
    preset: Annotated[
        str | None,
        option("Name of a preset, or a YAML file.", "--preset", "-p", autocompletion=options.complete_presets),
    ] = None,
    data: Annotated[
        str | None, option("Of encoder, VQGAN, feed-forward decoder a dataset; else a token cache.")
    ] = None,
    settings: Annotated[list[str] | None, options.changes("Change a field of the preset: training.steps=1000")] = None,
    resume: Annotated[
        bool, option("Go on from the newest checkpoint in OUT; preset, data and --set are the run's own.", "--resume")
    ] = False,
    model: Annotated[str | None, option("Its VQGAN shows samples; its tokens train a feed-forward decoder.")] = None,
    start: Annotated[str | None, option("Begin with a saved part: it, its run, or a whole model.", "--from")] = None,
    freeze: Annotated[
        list[str] | None, option("With --from, kept: embeddings, classes, blocks, blocks:N, head; of a VQGAN, tokens.")
    ] = None,
    lora: Annotated[
        int, option("With --from, train changes of this rank instead of the weights (LoRA); 0 is off.", min=0)
    ] = 0,
    workers: Annotated[int | None, option("Data loading threads; default: the preset's.", min=0)] = None,
    device: options.Device = None,
) -> None:
    """Train a part of the pipeline. Ctrl-C or SIGTERM saves a checkpoint, and prints the command that goes on exactly.

    Example:  digit train prior --preset cifar10-tiny-prior --data runs/tokens --out runs/prior

    Example:  digit train prior --resume --set training.steps=600 --out runs/prior

    Example:  digit train decoder --preset cifar10-onepass --data data/cifar10 --model runs/tokenizers --out
        runs/onepass

    Example:  digit train prior --from runs/prior --preset cifar10-tiny-prior-cond --data my-tokens --lora 8 --out
        runs/mine

    On several GPUs:  accelerate launch --num_processes 8 -m digit train prior --preset ... --data ... --out ...
    """
    from digit.training.build import request_for
    from digit.training.finetune import FineTune
    from digit.training.loop import Interrupted, train

    changes = [*(settings or []), *([] if workers is None else [f"training.workers={workers}"])]
    if start is None and (freeze or lora):
        raise DigitError("--freeze and --lora change how a saved model is trained; give it with --from.")
    origin = None if start is None else FineTune(source=start, freeze=tuple(freeze or ()), lora=lora)
    request = request_for(component, out if resume else None, preset, data, model, origin, changes)
    task, config = request.build()
    extend = resume and any(change.startswith(("training.steps=", "training.epochs=")) for change in changes)
    try:
        train(task, config, out, resume=resume, device=device, request=request, extend=extend)
    except Interrupted as stop:
        world = _process()[1]
        launcher = "digit" if world == 1 else f"torchrun --nproc_per_node {world} -m digit"
        again = [component, "--resume", "--out", str(out), *(["--device", device] if device else [])]
        typer.echo(f"{stop} Go on with: {launcher} train {shlex.join(again)}", err=True)
        raise typer.Exit(stop.exit_code) from None
    if _process()[0] == 0:
        _close(out, request)


def _close(out: Path, request: Request) -> None:
    """Print what a run reached beside the packaged run of its preset, where its curves are, and what is next."""
    from digit.core.files import write_file
    from digit.evaluation.report.runs import differences, known_curves, label, training_run
    from digit.evaluation.results import Result, shown

    run = training_run(out).beside(known_curves())
    curve = next(iter(run.references), None)
    names = [name for name in run.values if name.startswith("validation/")]
    rows: list[dict[str, Any]] = []
    for name in names or ["loss"]:
        rows.append({"": label(name), "this run": shown(run.values[name][-1][1])})
        if curve is not None:
            rows[-1]["expected"] = shown(curve.metrics[name][-1][1] if name in curve.metrics else None)
    notes = []
    if curve is not None:
        other = [
            text for text in differences(run.settings, curve.config) if text.startswith(("training.", "data.name"))
        ]
        notes.append(f"expected is the end of the packaged run {curve.name}; {'; '.join(other) or 'same settings'}.")
    with suppress(MissingPackageError):  # matplotlib; TensorBoard shows them too
        kept = {name: values for name, values in run.values.items() if name == "loss" or name in names}
        figure = replace(run, values=kept).figure()
        path = write_file(out / "curves.png", lambda aside: figure.savefig(aside, dpi=110, format="png"))
        notes.append(f"the curves are in {path}.")
    notes.append(f"all metrics: {out / 'metrics.jsonl'}, or tensorboard --logdir {shlex.quote(str(out))}")
    typer.echo(f"Trained: {out / 'model'}")
    title = "Validation" if names else "The last steps"
    Result(title=title, values=rows, data=run.settings.get("data"), notes=tuple(notes)).show()
    given = {"data": request.data, "model": request.model or "TOKENIZERS"}
    typer.echo(f"Next: {_next(request.component, out, **given)}")


def _next(component: str, out: Path, **given: str) -> str:
    """The command that usually follows, with capitals where a name is not known."""
    quoted = {name: shlex.quote(text) for name, text in {**given, "out": str(out)}.items()}
    return _NEXT[component].format(**quoted, beside=shlex.quote(f"{out.parent}{os.sep}") if out.parent.name else "")


def _process() -> tuple[int, int]:
    """Number of this process, and how many there are, as torchrun and accelerate launch say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
