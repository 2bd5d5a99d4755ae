"""Token sets of one encoder ranked by the bits that they save a decoder, for each bit that they cost a prior.

    python experiments/cifar10/token_sets.py --data data/cifar10 --out runs/token-sets

Every set is a codebook over other outputs of the packaged encoder (or of that of ``--encoder``): the last block, the
one before, their sum, both side by side through principal components, earlier blocks, larger and smaller vocabularies.
For each, a semantic prior and an AR decoder are trained for one epoch, and so is a prior over the VQ tokens alone. Bits
are those of images held out.
The last set is a control: its decoder learns with the semantic tokens of other images, behind the first set's prior.
``--vqgan experiments/cifar10/vqgan-f2`` asks over 256 VQ tokens an image instead of 64, ``--only`` for some sets,
``--fid 2000`` also for FID of so many sampled images against all training images.
"""

from __future__ import annotations

import argparse
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matched import PACKAGED, fidelity, shuffle

from digit import DigitPipeline
from digit.clustering.discretisers import Discretisation
from digit.core.config import load_preset
from digit.core.files import read_json, write_json
from digit.data.dataset import open_dataset
from digit.data.token_cache import Views, write_checksums
from digit.encoders import load_encoder
from digit.encoders.base import Combine
from digit.evaluation.metrics.fidelity import FidelityOptions
from digit.evaluation.metrics.inception import open_extractor
from digit.evaluation.metrics.probe_features import collect_features, encoder_features
from digit.evaluation.metrics.stability import NOISE, stability
from digit.evaluation.model_source import SamplingRun, spread
from digit.evaluation.steps import Step
from digit.evaluation.studies.points import Reference
from digit.evaluation.studies.ranking import NEIGHBOURS
from digit.evaluation.studies.stages import Stages
from digit.models.component import weights_checksum
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.pipeline.card import describe_model
from digit.training.tasks.encoder import neighbour_accuracy

FIT_IMAGES = 20_000
QUERIES = 2_000  # test images, whose neighbours are looked up among all training images
CHANGES = ("training.epochs=1", "model.transformer.dropout=0.1")


@dataclass(frozen=True)
class TokenSet:
    """Outputs of the encoder, and the codebook over them."""

    layers: tuple[int, ...] = ()
    combine: Combine = "concat"
    clusters: int = 1024
    pca: int | None = None
    shuffled: bool = False


SETS = {
    "last block": TokenSet(),
    "block before": TokenSet((-2,)),
    "sum of the two": TokenSet((-2, -1), "sum"),
    "both, 96 components": TokenSet((-2, -1), pca=96),
    "three blocks, 96 components": TokenSet((-3, -2, -1), pca=96),
    "second level (64 channels)": TokenSet((-3,)),
    "last block, K = 64": TokenSet(clusters=64),
    "last block, K = 4,096": TokenSet(clusters=4096),
    "last block, shuffled": TokenSet(shuffled=True),
}


def token_model(stages: Stages, component: str, tokens: Step, target: str) -> tuple[TokenModel, float]:
    """A prior or an AR decoder after one epoch, and the bits of a held-out image under it."""
    name = "cifar10-prior" if component == "prior" else "cifar10-ar"
    preset = load_preset(name, (*CHANGES, f"data.target={target}"))
    model, step = stages.token_model(component, name, preset, tokens)
    return model, float(step.value["metrics"]["nll"]) * model.config.length / math.log(2)


def joined(stages: Stages, semantic: Step, vq: Step) -> Step:
    """One token cache out of two over the same images, so that VQ tokens are made once for all sets."""

    def copy(folder: Path) -> None:
        shutil.copytree(vq.folder, folder, dirs_exist_ok=True)
        for path in semantic.folder.glob("shard-*/semantic.npy"):
            shard = folder / path.parent.name
            shutil.copy(path, shard)
            write_checksums(shard)
        ours, theirs = (read_json(step.folder / "index.json") for step in (semantic, vq))
        tokens = {**ours["tokens"], **theirs["tokens"]}
        write_json(folder / "index.json", {**theirs, "tokens": tokens, "models": [ours["models"], theirs["models"]]})

    return stages.steps.run("joined", {"semantic": semantic.folder.name, "vq": vq.folder.name}, copy)


def untrained(stages: Stages, pipe: DigitPipeline) -> dict[str, Any]:
    """20-NN accuracy of the features, and the share of tokens that noise changes."""

    def work(_: Path) -> dict[str, Any]:
        test = spread(stages.test_images, QUERIES)
        memory, queries = (
            collect_features(pipe, images, encoder_features, batch_size=stages.batch_size)
            for images in (stages.train_images, test)
        )
        accuracy = neighbour_accuracy(memory.values[0], memory.labels, queries.values[0], queries.labels, NEIGHBOURS)
        rows = stability(pipe, test, NOISE, batch_size=stages.batch_size).values
        return {"knn": accuracy, "changed": {str(row.level): row.changed.mean for row in rows}}

    found: dict[str, Any] = stages.steps.run("untrained", stages.tokenizer(pipe), work).value
    return found


def measure(stages: Stages, folder: Path, tokens: TokenSet, vq: Step) -> tuple[DigitPipeline, dict[str, Any]]:
    """What tokens of the encoder in ``folder`` cost, what they leave to the decoder, and what :func:`untrained` says of
    them; and the model over them, without a VQGAN.
    """
    encoder = load_encoder(folder, layers=tokens.layers, combine=tokens.combine)
    codebook = stages.codebook(encoder, tokens.clusters, FIT_IMAGES, kind=Discretisation(pca=tokens.pca))
    pipe = DigitPipeline(encoder=encoder, codebook=codebook)
    found = untrained(stages, pipe)
    cache = joined(stages, stages.tokens(pipe, Views()), vq)
    prior, spent = token_model(stages, "prior", cache, "semantic")
    if tokens.shuffled:
        cache = stages.steps.run("shuffled", {"cache": cache.folder.name}, partial(shuffle, cache.folder))
    decoder, left = token_model(stages, "decoder", cache, "vq")
    return pipe.with_parts(prior=prior, decoders={"ar": decoder}), {"spent": spent, "left": left, **found}


def fid_of(stages: Stages, pipe: DigitPipeline, num: int, reference: Reference) -> dict[str, float]:
    """FID and FID∞ of sampled images, without a filter."""
    run = SamplingRun(pipe, num, 0, decoder="ar" if pipe.decoders else None)
    inputs = {"model": describe_model(pipe)["parts"], "num": num, "reference": reference.describe()}
    work = stages.steps.run("fidelity", inputs, partial(fidelity, reference, run))
    return {name: work.value[name] for name in ("fid", "fid_infinity")}


def main() -> None:
    """Measure every set that is asked for; what is finished is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--encoder", type=Path, default=PACKAGED / "encoder")
    parser.add_argument("--vqgan", type=Path, default=PACKAGED / "vqgan")
    parser.add_argument("--only", help="numbers of sets, such as 0,3; all if left out")
    parser.add_argument("--fid", type=int, default=0, help="images a model to measure FID of; 0: none")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    stages = Stages(options.out, open_dataset(options.data, "train"), open_dataset(options.data, "test"))
    vqgan = VQGAN.from_pretrained(options.vqgan)
    alone = DigitPipeline(vqgan=vqgan, space="vq")
    vq = stages.tokens(alone, Views())
    prior, bits = token_model(stages, "prior", vq, "vq")
    found: dict[str, Any] = {"vqgan": options.vqgan.name, "alone": {"bits": bits}, "sets": {}}
    models = {"": alone.with_parts(prior=prior)}
    chosen = [list(SETS)[int(number)] for number in options.only.split(",")] if options.only else list(SETS)
    for name in chosen:
        pipe, line = measure(stages, options.encoder, SETS[name], vq)
        models[name] = pipe.with_parts(vqgan=vqgan)
        worth, encoder = (bits - line["left"]) / line["spent"], weights_checksum(pipe.encoder)
        found["sets"][name] = {**line, "worth": worth, "encoder": encoder}
        print(name, found["sets"][name], flush=True)
        write_json(options.out / "token-sets.json", found)
    if options.fid:
        reference = Reference.of("cifar10-train", open_extractor(), FidelityOptions())
        for name, pipe in models.items():
            line = found["sets"][name] if name else found["alone"]
            line |= fid_of(stages, pipe, options.fid, reference)
            print(name, line, flush=True)
        write_json(options.out / "token-sets.json", {**found, "num": options.fid})


if __name__ == "__main__":
    main()
