"""The tour: raw photographs through every stage at a small preset, in about ten minutes on two cores.

Each stage prints the command that does the same alone, and is skipped when an earlier, interrupted tour has finished
it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from digit.core.config import load_preset
from digit.core.devices import bf16_is_fast, pick_device
from digit.core.errors import require
from digit.core.files import write_file, write_json
from digit.core.grids import picture_grid
from digit.core.images import save_png, to_tensor
from digit.data.dataset import ImageDataset, open_dataset, read_description
from digit.data.token_cache import Views, build_token_cache
from digit.encoders import load_encoder
from digit.pipeline.assembly import assemble, part_folder
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.reconstruction import reconstruction_sheet
from digit.sampling import SamplingParams
from digit.training.build import build_task
from digit.training.logs import last_metrics, read_metrics
from digit.training.loop import train

CLUSTERS = 256  # K, small enough for a prior that sees few images
CODEBOOK_IMAGES = 1024  # 64 vectors each: as many as k-means of 256 clusters uses (256 * K)
CACHE_IMAGES = 10_000  # whose tokens prior and decoders learn
ROWS, COLUMNS = 8, 8
RUNS = ("encoder", "vqgan", "prior", "ar", "masked")


def run_tour(
    out: str | Path, data: str | Path | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Go through every stage.

    Args:
        out: the folder; runs, models and pictures go there.
        data: a dataset of 32-pixel images with classes; CIFAR-10 is built in ``out/cifar10`` if it is None.
        seed: of k-means and of the samples. The seeds of the trainings are in their presets.
        overrides: for every training preset, such as ``training.steps=50``; see :func:`digit.core.config.load_preset`.

    Returns:
        What ``summary.json`` holds.
    """
    out, started = Path(out), time.perf_counter()
    say = Console(stderr=True, highlight=False).print
    seconds: dict[str, float] = {}

    def stage(name: str, command: str, done: Path, work: Callable[[], object]) -> None:
        say(f"[bold]{name}[/]  [dim]{command}[/]")
        begun = time.perf_counter()
        if not done.exists():
            work()
        seconds[name] = round(time.perf_counter() - begun, 1)

    if bf16_is_fast(pick_device(None)):
        overrides = ["training.precision=bf16", *overrides]
    given = "".join(f" --set {item}" for item in overrides)
    source = Path(data) if data is not None else out / "cifar10"
    stage("photographs", f"digit data cifar10 --out {source}", source / "dataset.json", lambda: _build_cifar10(source))
    images = open_dataset(source, "train")

    def train_part(run: str, component: str, where: str | Path) -> None:
        preset = f"cifar10-tiny-{'prior-cond' if run == 'prior' else run}"
        command = f"digit train {component} --preset {preset} --data {where} --out {out / run}{given}"
        stage(
            run,
            command,
            out / run / "model" / "config.json",
            lambda: _train(component, load_preset(preset, overrides), preset, where, out / run),
        )

    train_part("encoder", "encoder", source)
    stage(
        "codebook",
        f"digit fit-codebook --encoder {out / 'encoder'} --data {source} --clusters {CLUSTERS} --out {out / 'codebook'}",
        out / "codebook" / "config.json",
        lambda: _fit(images, out, seed),
    )
    train_part("vqgan", "vqgan", source)
    stage(
        "tokens",
        f"digit cache-tokens --model {out / 'tokenizers'} --data {source} --out {out / 'tokens'}",
        out / "tokens.done",
        lambda: _cache(images, out),
    )
    for run, component in (("prior", "prior"), ("ar", "decoder"), ("masked", "decoder")):
        train_part(run, component, out / "tokens")

    begun = time.perf_counter()
    pipe = _put_together(out)
    _samples(pipe, out / "samples.png", seed)
    _reconstructions(pipe, source, out / "reconstructions.png")
    losses = {run: _losses(out / run) for run in RUNS}
    _plot(losses, out / "loss.png")
    seconds["pictures"] = round(time.perf_counter() - begun, 1)
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_stage": seconds,
        "images": len(images),
        "clusters": CLUSTERS,
        "codebook": json.loads((out / "codebook" / "config.json").read_text())["provenance"],
        "parts": {run: _outcome(out / run, losses[run]) for run in RUNS},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    write_json(out / "summary.json", summary)
    return summary


def _build_cifar10(folder: Path) -> None:
    from digit.data.cifar10 import build_cifar10

    build_cifar10(folder)


def _train(component: str, preset: dict[str, Any], name: str, data: str | Path, out: Path) -> None:
    task, config = build_task(component, preset, data, name)
    train(task, config, out, resume=True)


def _fit(images: ImageDataset, out: Path, seed: int) -> None:
    from digit.clustering.kmeans import fit_codebook

    some = images.subset(range(min(CODEBOOK_IMAGES, len(images))))
    pixels, _ = some.arrays()
    batches = (to_tensor(pixels[i : i + 128]) for i in range(0, len(some), 128))
    encoder = load_encoder(part_folder(out / "encoder"))
    book = fit_codebook(encoder, batches, CLUSTERS, seed=seed, total=len(some), provenance={"data": some.fingerprint})
    book.save_pretrained(out / "codebook")


def _cache(images: ImageDataset, out: Path) -> None:
    tokenizers = assemble(out / "encoder", out / "codebook", out / "vqgan", name="tour")
    tokenizers.save_pretrained(out / "tokenizers")
    some = images.subset(range(min(CACHE_IMAGES, len(images))))
    build_token_cache(tokenizers, some, out / "tokens", Views(center=True, flip=False))
    write_json(out / "tokens.done", {"images": len(some)})


def _put_together(out: Path) -> DigitPipeline:
    pipe = assemble(
        out / "encoder", out / "codebook", out / "vqgan", out / "prior", [out / "ar", out / "masked"], name="tour"
    ).with_parts(settings={"prior": SamplingParams(cfg_scale=1.5, top_k=100), "ar": SamplingParams(top_p=0.9)})
    pipe.save_pretrained(out / "model")
    return pipe


def _samples(pipe: DigitPipeline, path: Path, seed: int) -> None:
    """Eight classes, one a row."""
    labels = [row % pipe.num_classes for row in range(ROWS) for _ in range(COLUMNS)]
    titles = [pipe.class_names[labels[row * COLUMNS]] for row in range(ROWS)]
    save_png(picture_grid(pipe(labels, seed=seed), COLUMNS, row_titles=titles), path)


def _reconstructions(pipe: DigitPipeline, source: Path, path: Path) -> None:
    """Pictures that no part was trained on, where the dataset keeps some apart, beside what becomes of them."""
    splits = read_description(source)["splits"]
    test = open_dataset(source, "test" if "test" in splits else "train")
    pixels = torch.stack([to_tensor(test[i].image) for i in range(min(ROWS, len(test)))])
    save_png(reconstruction_sheet(pipe, pixels)[0], path)


def _losses(run: Path) -> list[tuple[int, float]]:
    """(step, training loss) as logged."""
    return [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]


def _outcome(run: Path, losses: list[tuple[int, float]]) -> dict[str, Any]:
    return {"first_loss": losses[0][1], "last_loss": losses[-1][1], "last_metrics": last_metrics(run)}


def _plot(losses: dict[str, list[tuple[int, float]]], path: Path) -> None:
    require("matplotlib", "eval", "Plotting the losses")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(losses), 3), layout="constrained")
    for axes, (run, points) in zip(figure.subplots(1, len(losses)), losses.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color="#2a6f97")
        axes.set(title=run, xlabel="step", ylabel="training loss" if run == "encoder" else "")
        axes.grid(alpha=0.3)

    def write(aside: Path) -> None:
        figure.savefig(aside, format="png", dpi=110)

    write_file(path, write)
