"""Fewer network passes an image: the study's priors in raster order, in random order, and masked, through one decoder.

    python experiments/cifar10/steps.py runs/steps --data data/cifar10 --num 2000 --out runs/steps/results

RUNS holds the trainings ``raster``, ``random``, ``masked`` and ``ssm``, whose commands are in README.md beside this
file. All have the packaged model's tokens and feed-forward decoder. Measured are FID against all training images,
images a second with the same PyTorch step for all (and with the C++ step, which knows raster order alone), and what
the random order is for: the likelihood of regions with everything around them known, on test images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit import DigitPipeline
from digit.core.files import write_file, write_json
from digit.core.grids import image_grid
from digit.core.images import save_png, to_pil, to_tensor
from digit.data.dataset import open_dataset
from digit.evaluation.metrics.fidelity import FidelityOptions
from digit.evaluation.metrics.inception import open_extractor
from digit.evaluation.model_source import SamplingRun, image_batches
from digit.evaluation.results import COLORS, legend, panels
from digit.evaluation.steps import Steps
from digit.evaluation.studies.points import Reference
from digit.models.component import load_component
from digit.models.token_model import TokenModel
from digit.pipeline.card import describe_model
from digit.pipeline.editing import edit_region
from digit.sampling.engines.acceleration import accelerate
from digit.sampling.request import SampleRequest
from digit.training.logs import last_metrics

PASSES = {"raster": (64,), "random": (64, 32, 16, 8), "masked": (16, 8, 4), "ssm": (64,)}
SETTINGS = {"cfg_scale": 2.0, "top_p": 0.95}  # of the packaged prior
BATCHES = (64, 1)  # images at a time, for the rate
REGIONS = {"a square in the middle": (slice(2, 6), slice(2, 6)), "the upper half": (slice(0, 4), slice(0, 8))}
MASKED_IMAGES = 8  # in the sheet of completions


def asked(kind: str, passes: int) -> dict[str, Any]:
    """The settings of a point; in raster order there are as many passes as tokens."""
    return SETTINGS if kind in ("raster", "ssm") else {**SETTINGS, "steps": passes}


def rate(pipe: DigitPipeline, settings: dict[str, Any], batch: int, seconds: float = 4.0) -> float:
    """Images a second, from the request to pixels, after one batch that is not counted."""
    labels, done, began = [i % 10 for i in range(batch)], 0, 0.0
    while not done or time.perf_counter() - began < seconds:
        pipe(labels, seed=done, **settings)
        if not began:
            began = time.perf_counter()
            continue
        done += batch
    return done / (time.perf_counter() - began)


@torch.inference_mode()
def region_bits(prior: TokenModel, tokens: Tensor, labels: Tensor, region: Tensor) -> float:
    """Bits a token of a region (64,) bool, one token after the other in raster order. A random-order prior knows
    everything around it; a raster prior what stands before.
    """
    order = torch.cat([(~region).nonzero().flatten(), region.nonzero().flatten()])  # known tokens first
    sums, inside = 0.0, int(region.sum())
    for part, classes in zip(tokens.split(250), labels.split(250), strict=True):
        if prior.config.role == "random":
            logits = prior(part, classes, order=order.expand(len(part), -1))[:, -inside:]
        else:
            logits = prior(part, classes)[:, :-1][:, region]
        chosen = logits.float().log_softmax(-1).gather(2, part[:, region][..., None])
        sums -= float(chosen.double().sum())
    return sums / len(tokens) / inside / math.log(2)


def likelihoods(pipes: dict[str, DigitPipeline], data: Path, num: int) -> dict[str, dict[str, float]]:
    """Bits a token by region and prior, on test images."""
    images = open_dataset(data, "test")
    images = images.subset(range(0, len(images), len(images) // num))
    first = pipes["raster"]
    tokens = torch.cat([first.tokenizer.encode(batch.images) for batch in image_batches(images, 32, 250)])
    labels = torch.from_numpy(images.labels)
    found = {}
    everywhere = {"the whole image": (slice(0, 8), slice(0, 8))}
    for name, (rows, columns) in {**REGIONS, **everywhere}.items():
        region = torch.zeros(8, 8, dtype=torch.bool)
        region[rows, columns] = True
        found[name] = {
            kind: region_bits(pipes[kind].part("prior"), tokens, labels, region.flatten())
            for kind in ("raster", "random")
        }
    return found


def completions(pipes: dict[str, DigitPipeline], data: Path, path: Path) -> None:
    """A sheet: image, the image without its middle, and what each prior puts there, two seeds each."""
    images = open_dataset(data, "test")
    chosen = [int((images.labels == label).nonzero()[0][3]) for label in range(MASKED_IMAGES)]
    pixels = torch.stack([to_tensor(images[i].image) for i in chosen])  # (B, 3, 32, 32)
    labels = torch.from_numpy(images.labels[chosen])
    region = torch.zeros(32, 32, dtype=torch.bool)
    region[8:24, 8:24] = True
    columns = [pixels, pixels.masked_fill(region, 0.5)]
    for kind in ("raster", "random"):
        for seed in (0, 1):
            request = SampleRequest(range(len(chosen)), seed, labels, "onepass", asked(kind, 16))
            tokens = edit_region(pipes[kind], pixels, region, request)
            columns.append(pipes[kind].to_pixels(tokens).cpu())
    cells = [to_pil(column[row].clamp(0, 1)) for row in range(len(chosen)) for column in columns]
    titles = ["image", "hidden", *(f"{kind}\nseed {seed}" for kind in ("raster", "random") for seed in (0, 1))]
    save_png(image_grid(cells, columns=len(columns), column_titles=titles), path)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """FID, and images a second, over passes."""
    figure, places = panels(2, (5.2, 4.0))
    for axes, (key, title) in zip(
        places, (("fid", "FID ↓"), ("rate_64", "images a second, 64 at a time ↑")), strict=True
    ):
        for color, kind in zip(COLORS[1:], PASSES, strict=False):
            line = [(p["passes"], p[key]) for p in points if p["kind"] == kind]
            axes.plot(*zip(*line, strict=True), "o-", color=color, label=kind, markersize=5)
        axes.set(xlabel="passes of the prior an image", ylabel=title)
        axes.set_xscale("log", base=2)
        axes.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axes.margins(y=0.12)
    legend(places)
    write_file(path, lambda aside: figure.savefig(aside, dpi=150, format="png"))


def _parameters(pipe: DigitPipeline) -> int:
    return sum(p.numel() for p in pipe.part("prior").parameters())


def main() -> None:
    """Measure; finished points are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--num", type=int, default=2000, help="images a point")
    parser.add_argument("--out", type=Path, default=Path("runs/steps/results"))
    options = parser.parse_args()
    base, pipes = DigitPipeline.from_pretrained("cifar10"), {}
    for kind in PASSES:
        prior = load_component(options.runs / kind / "model", TokenModel)
        pipes[kind] = base.with_parts(prior=prior, name=kind)
    reference = Reference.of("cifar10-train", open_extractor(), FidelityOptions())
    steps = Steps(options.out, {"num": options.num})

    def once(name: str, inputs: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return dict(steps.run(name, inputs, lambda _: work()).value)

    points = []
    for kind, all_passes in PASSES.items():
        pipe = pipes[kind]
        inputs = {"model": describe_model(pipe)["parts"], "kind": kind, "reference": reference.describe()}
        for passes in all_passes:
            settings = asked(kind, passes)
            run = SamplingRun(pipe, options.num, decoder="onepass", settings=settings)

            def measured(run: SamplingRun = run) -> dict[str, Any]:
                return dict(reference.measure(run.batches(), run.num, run.pipe.name)["values"])

            point = {"kind": kind, "passes": passes, **once("fid", {**inputs, "passes": passes}, measured)}
            accelerate(pipe.part("prior"), native=False)
            point |= {f"rate_{batch}": rate(pipe, settings, batch) for batch in BATCHES}
            accelerate(pipe.part("prior"))
            if kind == "raster":
                point |= {f"rate_{batch}_native": rate(pipe, settings, batch) for batch in BATCHES}
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items()))
            points.append(point)
    bits = likelihoods(pipes, options.data, 1000)
    for region, values in bits.items():
        print(f"bits a token of {region}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in values.items()))
    trained = {kind: {"parameters": _parameters(pipes[kind]), **last_metrics(options.runs / kind)} for kind in PASSES}
    found = {"num": options.num, "settings": SETTINGS, "points": points, "bits": bits, "trained": trained}
    write_json(options.out / "steps.json", found)
    draw(points, options.out / "steps.png")
    completions(pipes, options.data, options.out / "completions.png")


if __name__ == "__main__":
    main()
