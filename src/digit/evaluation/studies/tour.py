"""The end-to-end example: images of CIFAR-10 through every stage at a small preset, in ten to thirty minutes on two
cores.

Each stage prints the command that does the same alone, and is skipped when an earlier, interrupted run has finished it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from digit.clustering.kmeans import fit_codebook
from digit.core.config import load_preset
from digit.core.files import read_json, write_file, write_json
from digit.core.grids import image_grid
from digit.core.images import save_png, to_tensor
from digit.data.cifar10 import build_cifar10
from digit.data.dataset import open_dataset, read_description
from digit.data.token_cache import Views, build_token_cache
from digit.encoders import load_encoder
from digit.evaluation.results import OURS, panels
from digit.evaluation.steps import Steps
from digit.pipeline.assembly import assemble, part_folder
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
SHARES = {
    "images": 0.03, "encoder": 0.25, "codebook": 0.01, "vqgan": 0.24, "tokens": 0.04, "prior": 0.08, "ar": 0.2,
    "masked": 0.12, "samples": 0.03,
}  # fmt: skip
"""The stages in order, and what share of the whole time each takes, as measured on two cores; from these, and the time
that the finished ones took here, comes what is left.
"""


class _Stages:
    """Runs the stages one after another, says which is next and how long the rest takes, and skips finished ones."""

    def __init__(self, out: Path, shared: dict[str, Any]) -> None:
        self.out, self.steps, self.seconds = out, Steps(out / "stages", shared), dict[str, float]()
        self.done = 0.0  # share of the work that was done here, in `spent` seconds
        self.spent = 0.0

    def run(self, name: str, command: str, work: Callable[[], None], **inputs: Any) -> None:
        """Do a stage unless it is finished; another input than that of an earlier run is another stage."""
        before = list(SHARES).index(name)
        left = 1 - sum(list(SHARES.values())[:before])
        rest = f", about {max(1, round(self.spent / self.done * left / 60))} min left" if self.done else ""
        told = f"[bold]Stage {before + 1} of {len(SHARES)}: {name}[/]{rest}  [dim]{command}[/]"
        Console(stderr=True, highlight=False).print(told, soft_wrap=True)
        began = time.perf_counter()

        step = self.steps.run(name, inputs, lambda _: work())
        self.seconds[name] = round(time.perf_counter() - began, 1)
        if not step.reused:
            self.done, self.spent = self.done + SHARES[name], self.spent + self.seconds[name]


def run_tour(
    out: str | Path, data: str | Path | None = None, seed: int = 0, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Go through every stage.

    Args:
        out: the folder; runs, models and images go there.
        data: a dataset of 32-pixel images with classes; CIFAR-10 is built in ``out/cifar10`` if it is None.
        seed: of k-means and of the samples. The seeds of the trainings are in their presets.
        overrides: for every training preset, such as ``training.steps=50``; see :func:`digit.core.config.load_preset`.

    Returns:
        What ``summary.json`` holds.
    """
    out, started = Path(out), time.perf_counter()
    overrides = ["training.precision=auto", *overrides]
    changes = "".join(f" --set {item}" for item in overrides)
    source = Path(data) if data is not None else out / "cifar10"
    stages = _Stages(out, {"data": str(source), "overrides": list(overrides)})

    def download() -> None:
        if not (source / "dataset.json").exists():
            build_cifar10(source)

    stages.run("images", f"digit data cifar10 --out {source}", download)
    images = open_dataset(source, "train")

    def train_part(run: str, component: str, where: str | Path) -> None:
        name = f"cifar10-tiny-{'prior-cond' if run == 'prior' else run}"
        preset = load_preset(name, overrides)

        def work() -> None:
            task, config = build_task(component, preset, where, name)
            train(task, config, out / run, resume=True)

        command = f"digit train {component} --preset {name} --data {where} --out {out / run}{changes}"
        stages.run(run, command, work, preset=preset)

    def fit() -> None:
        some = images.subset(range(min(CODEBOOK_IMAGES, len(images))))
        pixels, _ = some.arrays()
        batches = (to_tensor(pixels[i : i + 128]) for i in range(0, len(some), 128))
        facts: dict[str, Any] = {"total": len(some), "provenance": {"data": some.fingerprint}}
        book = fit_codebook(load_encoder(part_folder(out / "encoder")), batches, CLUSTERS, seed=seed, **facts)
        book.save_pretrained(out / "codebook")

    def cache() -> None:
        tokenizers = assemble(out / "encoder", out / "codebook", out / "vqgan", name="tour")
        tokenizers.save_pretrained(out / "tokenizers")
        some = images.subset(range(min(CACHE_IMAGES, len(images))))
        build_token_cache(tokenizers, some, out / "tokens", Views(center=True, flip=False))

    train_part("encoder", "encoder", source)
    given = f"--encoder {out / 'encoder'} --data {source} --clusters {CLUSTERS}"
    stages.run("codebook", f"digit fit-codebook {given} --out {out / 'codebook'}", fit, clusters=CLUSTERS, seed=seed)
    train_part("vqgan", "vqgan", source)
    given = f"--model {out / 'tokenizers'} --data {source}"
    stages.run("tokens", f"digit cache-tokens {given} --out {out / 'tokens'}", cache, images=CACHE_IMAGES, seed=seed)
    for run, component in (("prior", "prior"), ("ar", "decoder"), ("masked", "decoder")):
        train_part(run, component, out / "tokens")
    losses = {run: [(line["step"], line["loss"]) for line in read_metrics(out / run) if "loss" in line] for run in RUNS}
    command = f"digit generate {out / 'model'} --out {out / 'more'}"
    stages.run("samples", command, lambda: _show(out, source, seed, losses), seed=seed)
    summary = {
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_stage": stages.seconds,
        "images": len(images),
        "clusters": CLUSTERS,
        "codebook": read_json(out / "codebook" / "config.json")["provenance"],
        "parts": {
            run: {"first_loss": pairs[0][1], "last_loss": pairs[-1][1], "last_metrics": last_metrics(out / run)}
            for run, pairs in losses.items()
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }
    write_json(out / "summary.json", summary)
    return summary


def _show(out: Path, source: Path, seed: int, losses: dict[str, list[tuple[int, float]]]) -> None:
    """The whole model, and its images: eight classes, one a row; photographs that no part was trained on, where the
    dataset keeps some apart, beside what becomes of them; and the losses.
    """
    pipe = assemble(
        out / "encoder", out / "codebook", out / "vqgan", out / "prior", [out / "ar", out / "masked"], name="tour"
    ).with_parts(settings={"prior": SamplingParams(cfg_scale=1.5, top_k=100), "ar": SamplingParams(top_p=0.9)})
    pipe.save_pretrained(out / "model")
    labels = [row % pipe.num_classes for row in range(ROWS) for _ in range(COLUMNS)]
    titles = [pipe.class_names[labels[row * COLUMNS]] for row in range(ROWS)]
    save_png(image_grid(pipe(labels, seed=seed), COLUMNS, row_titles=titles), out / "samples.png")
    splits = read_description(source)["splits"]
    test = open_dataset(source, "test" if "test" in splits else "train")
    pixels = torch.stack([to_tensor(test[i].image) for i in range(min(ROWS, len(test)))])
    save_png(reconstruction_sheet(pipe, pixels)[0], out / "reconstructions.png")
    figure, places = panels(len(losses), (3.2, 3.0))
    for axes, (run, points) in zip(places, losses.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=OURS)
        axes.set(title=run, xlabel="step", ylabel="training loss")
    write_file(out / "loss.png", lambda aside: figure.savefig(aside, format="png", dpi=110))
