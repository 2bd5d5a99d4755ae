"""Which tokens to train on, before anybody trains for days: a small prior is trained briefly on each, and probed.

Source: [0] Xiong et al. 2025, arXiv 2504.08736 (GigaTok), whose AR probing finds that loss and probe accuracy of a
    small model
foretell those of large ones. They train 111M parameters for 50 epochs; here the size and the length are options, and
the ranking is only as good as they allow. Loss is given per image too, for tokens of different number and vocabulary
say nothing side by side.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from digit.clustering.kmeans import fit_codebook
from digit.core.config import config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset
from digit.data.sampling import Batches, OrderedSampler
from digit.data.token_cache import TokenCache, build_token_cache
from digit.encoders.base import weights_checksum
from digit.evaluation.metrics.probe import ProbeData, ProbeOptions, ProbeScore, score_features
from digit.evaluation.model_source import describe_data
from digit.evaluation.result import OURS, PAPER, Record, describe_model, figure
from digit.evaluation.studies.points import Points
from digit.models.component import load_component
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.models.transformer import PositiveInt
from digit.pipeline.assembly import part_folder
from digit.pipeline.pipeline import DigitPipeline
from digit.training.config import Positive, TrainingConfig
from digit.training.engine import seed_everything
from digit.training.loop import train
from digit.training.tasks.tokens import TokenData, TokenTask, token_model_config


@config
class ScreenOptions:
    """The small prior and its short training.

    Attributes:
        steps, batch_size, lr: of the training; AdamW, cosine after a tenth of warm-up.
        dim, depth, heads: of the prior.
        probe: how its layers are probed.
        seed: of everything random.
    """

    steps: PositiveInt = 300
    batch_size: PositiveInt = 64
    lr: Positive = 1e-3
    dim: PositiveInt = 128
    depth: PositiveInt = 4
    heads: PositiveInt = 4
    probe: ProbeOptions = ProbeOptions(epochs=30, lrs=(0.4, 4.0), standardize=True, neighbours=0)
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """Tokens to judge.

    Attributes:
        name: for people.
        pipe: with encoder and codebook, or in space "vq" with a VQGAN; nothing else of it is used.
    """

    name: str
    pipe: DigitPipeline


def candidates(
    models: Mapping[str, DigitPipeline],
    clusters: Sequence[int],
    dataset: ImageDataset,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Candidate]:
    """The tokens of some models as they are, or with codebooks of other sizes fitted on the spot.

    Args:
        models: name -> model; one without encoder and codebook stands for its VQ tokens.
        clusters: sizes K of codebooks to fit for each encoder; none keeps the models' own.
        dataset: training images for k-means.
        batch_size: images at a time.
        seed: of k-means.

    Raises:
        DigitError: a model that makes no tokens, or codebooks were asked for and a model has no encoder.
    """
    found = []
    for name, pipe in models.items():
        if clusters:
            encoder: Any = pipe.part("encoder")
            cut = Transform(size=encoder.preprocessing.image_size)
            for count in clusters:
                batches = Batches(dataset, OrderedSampler(len(dataset), batch_size), cut)
                codebook = fit_codebook(encoder, batches, count, seed=seed, device=pipe.device, total=len(dataset))
                part = DigitPipeline(encoder=encoder, codebook=codebook.to(pipe.device), name=pipe.name)
                found.append(Candidate(f"{name}, K = {count:,}", part))
        elif pipe.encoder is not None and pipe.codebook is not None:
            part = DigitPipeline(encoder=pipe.encoder, codebook=pipe.codebook, name=pipe.name)
            found.append(Candidate(f"{name}, K = {pipe.codebook.config.clusters:,}", part))
        elif pipe.vqgan is not None:
            part = DigitPipeline(vqgan=pipe.vqgan, space="vq", name=pipe.name)
            found.append(Candidate(f"{name}, {pipe.vqgan.config.codes:,} VQ codes", part))
        else:
            raise DigitError(f"The model '{name}' makes no tokens: it needs an encoder with a codebook, or a VQGAN.")
    return found


def screen_one(
    candidate: Candidate,
    train_images: ImageDataset,
    test_images: ImageDataset,
    out: str | Path,
    options: ScreenOptions,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a small prior on a candidate's tokens and probe it.

    Args:
        candidate: the tokens.
        train_images: with labels; a tenth, at most 512, is held out for the loss.
        test_images: with labels, for the probe.
        out: a folder for the token cache and the training run; the run is resumed if it was interrupted.
        options: size and length.
        device: of the training.

    Returns:
        ``nats_per_token`` and ``bits_per_image`` of held-out tokens; ``saved``, the part of log K that the prior saves
        against uniform tokens; ``probe``, accuracy by layer, with ``middle`` and ``best``.
    """
    out, space = Path(out), candidate.pipe.space
    cache = build_token_cache(candidate.pipe, train_images, out / "tokens")
    assert cache is not None
    prior = _train(cache, space, out / "run", options, device)
    prior.to(candidate.pipe.device)
    pipe = candidate.pipe.with_parts(prior=prior)
    data = ProbeData(train_images, test_images)
    classes = len(train_images.classes) or int(train_images.labels.max()) + 1
    scores, _ = score_features(*data.features(pipe, "prior", describe_model(pipe)), classes, options.probe, pipe.device)
    nll = float(prior.provenance["metrics"]["nll"])  # type: ignore[index]
    tokens = cache.space(space)
    return {
        "vocabulary": tokens.vocab_size,
        "tokens": tokens.length,
        "nats_per_token": nll,
        "bits_per_image": nll * tokens.length / math.log(2),
        "saved": 1 - nll / math.log(tokens.vocab_size),
        "probe": [score.accuracy for score in scores],
        "middle": scores[options.depth // 2].accuracy,
        "best": max(scores, key=_accuracy).accuracy,
        "best_state": max(scores, key=_accuracy).state,
    }


def _accuracy(score: ProbeScore) -> float:
    return score.accuracy


def _train(cache: TokenCache, space: Any, out: Path, options: ScreenOptions, device: str | None) -> TokenModel:
    """The small prior, trained; from ``out`` where that is finished or was begun."""
    values = {"role": "prior", "transformer": {"dim": options.dim, "depth": options.depth, "heads": options.heads}}
    data = TokenData(target=space)
    if not (out / "model" / "config.json").is_file():
        seed_everything(options.seed)
        model = TokenModel(token_model_config(values, cache, data, "the screening prior"))
        settings = {
            "steps": options.steps, "batch_size": options.batch_size, "lr": options.lr, "schedule": "cosine",
            "warmup_steps": options.steps // 10, "seed": options.seed, "validate_every": 0,
        }  # fmt: skip
        training = from_dict(TrainingConfig, settings, "the screening training")
        train(TokenTask(model, cache, data), training, out, resume=True, device=device)
    return load_component(part_folder(out), TokenModel, TokenModelConfig)


def screen_record(
    entries: Sequence[Candidate],
    train_images: ImageDataset,
    test_images: ImageDataset,
    out: str | Path,
    options: ScreenOptions | None = None,
    device: str | None = None,
) -> tuple[Record, list[dict[str, Any]]]:
    """Screen candidates, and write ``result.json`` and ``screen.png`` into ``out``; what is finished is not done again.

    Returns:
        The record, and a line for each candidate, the best middle layer first.
    """
    options, out, began = options or ScreenOptions(), Path(out), time.monotonic()
    images = {"train": describe_data(train_images), "test": describe_data(test_images)}
    store = Points(out / "points", {"options": to_dict(options), "images": [d["fingerprint"] for d in images.values()]})
    lines = []
    for entry in entries:
        weights = [
            weights_checksum(part)
            for part in (entry.pipe.encoder, entry.pipe.codebook, entry.pipe.vqgan)
            if isinstance(part, torch.nn.Module)
        ]
        value = store.get({"weights": weights})
        if value is None:
            folder = out / entry.name.replace(", ", "-").replace(" ", "").replace(",", "").replace("/", "-")
            value = store.put(
                {"weights": weights}, screen_one(entry, train_images, test_images, folder, options, device)
            )
        lines.append({"name": entry.name, **value})
    lines.sort(key=lambda line: -line["middle"])
    _plot(lines, out / "screen.png")
    record = Record(
        kind="screen",
        title="Tokens ranked by a short training of a small prior",
        values=lines,
        settings=to_dict(options),
        model={entry.name: describe_model(entry.pipe) for entry in entries},
        data=images,
        notes=[
            f"A prior of {options.depth} blocks of width {options.dim} was trained for {options.steps} steps of "
            f"{options.batch_size} images; ranked by the probe of its middle layer (state {options.depth // 2}).",
            "So short a training ranks what is learnt first. Differences of one or two points are within its noise.",
        ],
        plots=["screen.png"],
        seconds=time.monotonic() - began,
    )
    record.write(out)
    return record, lines


def _plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    with figure(path, 2, (6.0, 0.45 * len(lines) + 2.2)) as (left, right):
        places = range(len(lines))
        left.barh(places, [100 * line["middle"] for line in lines], color=OURS, label="middle layer")
        left.plot([100 * line["best"] for line in lines], places, "D", color=PAPER, label="best layer", markersize=5)
        left.set_yticks(places, [line["name"] for line in lines])
        left.invert_yaxis()
        left.set(xlabel="linear probe of the small prior, %", title="What the prior learns about classes")
        left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=2)
        right.barh(places, [100 * line["saved"] for line in lines], color=OURS)
        right.set_yticks(places, [""] * len(lines))
        right.invert_yaxis()
        right.set(xlabel="saved of log K, % (higher: easier to predict)", title="How predictable the tokens are")
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
