"""The pair at equal training flops: a VQ prior against a semantic prior with its AR decoder, over 8 x 8 or 16 x 16 VQ
tokens.

    python experiments/cifar10/matched.py shuffle runs/tokens-f2 --out runs/tokens-shuffled
    python experiments/cifar10/matched.py measure runs/matched --num 10000 --out runs/matched/results

RUNS holds the trainings ``vq-s0``, ``semantic-s0`` and ``ar-s0`` (and further seeds), ``vq-large-s0``, a VQ prior of as
many parameters as the pair, and ``ar-shuffled-s0``, whose semantic tokens are those of other images; README.md beside
this file has their commands. The shuffled decoder is sampled behind the same prior: what its prefix says is of no use,
and everything else is equal. ``--vqgan`` is the one whose tokens they are.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import digit
from digit import DigitPipeline
from digit.core.files import write_folder, write_json
from digit.data.token_cache import write_checksums
from digit.evaluation.metrics.fidelity import FidelityOptions
from digit.evaluation.metrics.inception import open_extractor
from digit.evaluation.model_source import SamplingRun
from digit.evaluation.steps import Steps
from digit.evaluation.studies.points import Reference
from digit.models.component import load_component
from digit.models.token_model import TokenModel
from digit.pipeline.assembly import assemble
from digit.pipeline.card import describe_model
from digit.training.health import forward_flops
from digit.training.logs import last_metrics, read_metrics

PACKAGED = Path(digit.__file__).parent / "packaged" / "cifar10"
MODELS = {
    "VQ prior": ("vq",),
    "VQ prior of as many parameters as the pair": ("vq-large",),
    "semantic prior + AR decoder": ("semantic", "ar"),
    "the same, decoder trained with shuffled semantic tokens": ("semantic", "ar-shuffled"),
}
"""The trainings of each model, prior first."""


def shuffle(cache: Path, out: Path, seed: int = 0) -> None:
    """A copy of a token cache in which every image has the semantic tokens of another one."""
    with write_folder(out) as aside:
        shutil.copytree(cache, aside, dirs_exist_ok=True)
        paths = sorted(aside.glob("shard-*/semantic.npy"))
        parts = [np.load(path) for path in paths]
        whole = np.concatenate(parts)  # (images, views, 64)
        order = np.random.default_rng(seed).permutation(len(whole))
        others = np.empty_like(whole)
        others[order] = whole[np.roll(order, 1)]  # one cycle through all images: none keeps its own
        ends = np.cumsum([len(part) for part in parts])[:-1]
        for path, part in zip(paths, np.split(others, ends), strict=True):
            np.save(path, part)
            write_checksums(path.parent)


def training(run: Path) -> dict[str, Any]:
    """What a training cost and reached: parameters, steps, PFLOP, minutes, bits of a held-out image."""
    model = load_component(run / "model", TokenModel)
    facts, metrics = model.provenance, last_metrics(run)
    flops = 3 * forward_flops(model.config)  # an image, forward and backward
    rates = [row["examples_per_second"] for row in read_metrics(run) if "examples_per_second" in row]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": facts["steps"],
        "images": facts["examples_seen"],
        "minutes": facts["examples_seen"] / statistics.harmonic_mean(rates) / 60,
        "lr": facts["training"]["lr"],
        "pflop": flops * facts["examples_seen"] / 1e15,
        "bits": metrics["validation/nll"] * model.config.length / math.log(2),
    }


def pipelines(runs: Path, vqgan: Path, seed: int) -> Mapping[str, DigitPipeline]:
    """The models of a seed whose trainings are finished."""
    found = {}
    for name, parts in MODELS.items():
        prior, *decoders = (runs / f"{part}-s{seed}" for part in parts)
        if all((run / "model" / "config.json").exists() for run in (prior, *decoders)):
            tokenizer = (PACKAGED / "encoder", PACKAGED / "codebook") if decoders else (None, None)
            found[name] = assemble(*tokenizer, vqgan, prior, decoders, name=name)
    return found


def fidelity(reference: Reference, run: SamplingRun, _folder: Path) -> dict[str, Any]:
    """FID and FID∞ of a run."""
    return dict(reference.measure(run.batches(), run.num, run.pipe.name)["values"])


def main() -> None:
    """Shuffle, or measure; finished models are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shuffle", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vqgan", type=Path, default=Path(__file__).parent / "vqgan-f2")
    parser.add_argument("--num", type=int, default=10_000, help="images a model")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "shuffle":
        shuffle(options.folder, options.out)
        return
    reference = Reference.of("cifar10-train", open_extractor(), FidelityOptions())
    steps, rows = Steps(options.out, {"num": options.num}), []
    for seed in range(options.seeds):
        for name, pipe in pipelines(options.folder, options.vqgan, seed).items():
            inputs = {"model": describe_model(pipe)["parts"], "seed": seed, "reference": reference.describe()}
            run = SamplingRun(pipe, options.num, seed, decoder="ar" if pipe.decoders else None)
            values = steps.run("fidelity", inputs, partial(fidelity, reference, run)).value
            parts = {part: training(options.folder / f"{part}-s{seed}") for part in MODELS[name]}
            rows.append({"model": name, "seed": seed, "trainings": parts, **values})
            print(rows[-1])
    write_json(options.out / "matched.json", {"num": options.num, "models": rows})


if __name__ == "__main__":
    main()
