"""What a frozen prior knows: a linear classifier on the mean of each layer's states (the paper's Table 2 and figure
3b).

The authors' protocol (DAMO-NLP-SG/DiGIT at cd6d8ca): classifier n reads state n averaged over all 1 + N positions, the
embedding is state 0 and the last block's output is left out; SGD with momentum 0.9, lr 0.4 at a batch of 1,024, cosine
to 0, no weight decay, no norm. Training images are random resized crops, new ones in each epoch; validation images are
scaled as the model takes them, and their middle goes to the encoder at the size that it sees (256 and 224). Features of
fixed views can be kept instead, so that every learning rate costs minutes. The prior is given no class label.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from digit.core.config import PositiveInt, Probability, config, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_tensors, write_tensors
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset
from digit.evaluation import paper
from digit.evaluation.metrics.probe_features import FEATURES, Features, collect_features, crops, fresh_feed
from digit.evaluation.model_source import describe_data
from digit.evaluation.results import OTHER, OURS, PAPER, Result, Rows, legend, panels, timed
from digit.evaluation.steps import Steps
from digit.models.probe import LinearProbe, LinearProbeConfig
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.tasks.encoder import neighbour_accuracy

AUTHORS_LR, AUTHORS_BATCH = 0.4, 1024
_CHUNK = 4096  # images classified at a time


@config
class ProbeOptions:
    """How the classifiers are trained.

    Attributes:
        epochs: passes over the training images. The authors: 80.
        batch_size: examples a step.
        lrs: learning rates at a batch of 1,024, scaled linearly to ``batch_size``; every layer is trained with each.
        momentum: of SGD.
        standardize: bring every feature to mean 0 and deviation 1 over the training images, which need kept features.
            Not the authors' protocol, but one learning rate then serves layers of different scale.
        neighbours: of the k-NN check; 0 leaves it out.
        temperature: of its votes' weights, exp(cosine / temperature); infinity counts every neighbour alike.
        seed: of weights and order.
    """

    epochs: PositiveInt = 80
    batch_size: PositiveInt = AUTHORS_BATCH
    lrs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (AUTHORS_LR,)
    momentum: Probability = 0.9
    standardize: bool = False
    neighbours: Annotated[int, Field(ge=0)] = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True)
class ProbeScore:
    """Accuracies of one state, as shares of the validation images; state 0 is the embedding, n the output of block n.

    ``accuracy`` is that of the best learning rate ``lr``, chosen on the validation images themselves; ``knn`` is None
    where it was left out.
    """

    state: int
    accuracy: float
    lr: float
    by_lr: dict[str, float]
    knn: float | None


@dataclass(frozen=True)
class ProbeValues:
    """The prior's layers, the encoder's own features where they were probed, chance, and the prior's depth."""

    layers: tuple[ProbeScore, ...]
    encoder: ProbeScore | None
    chance: float
    depth: int


@dataclass(frozen=True, kw_only=True)
class Probe(Result):
    """Linear probes of every layer."""

    kind: str = "probe"
    values: ProbeValues

    @property
    def best(self) -> ProbeScore:
        """The best layer."""
        return max(self.values.layers, key=lambda layer: layer.accuracy)

    def rows(self) -> Rows:
        named = [(f"state {s.state}" + " (embedding)" * (s.state == 0), s) for s in self.values.layers]
        named += [("encoder", self.values.encoder)] if self.values.encoder else []
        rows = []
        for name, score in named:
            knn = None if score.knn is None else f"{100 * score.knn:.2f}"
            told = {"Top-1, %": f"{100 * score.accuracy:.2f}", "Best learning rate": score.lr, "k-NN, %": knn}
            rows.append({"Features": name, **told})
        return rows

    def figure(self) -> Any:
        layers, encoder = self.values.layers, self.values.encoder
        x = [layer.state for layer in layers]
        figure, (axes,) = panels(1, (6.4, 4.2))
        axes.plot(x, [100 * layer.accuracy for layer in layers], "o-", color=OURS, label="linear probe of the prior")
        if all(layer.knn is not None for layer in layers):
            axes.plot(x, [100 * (s.knn or 0) for s in layers], "s:", color=OTHER, label="k-NN", markersize=4)
        if encoder is not None:
            axes.axhline(100 * encoder.accuracy, color=PAPER, ls="--", label="linear probe of the encoder itself")
        axes.axhline(100 * self.values.chance, color=PAPER, ls=":", label="chance")
        axes.set(xlabel="state of the prior (0: embedding, n: output of block n)", ylabel="top-1 accuracy, %")
        axes.set(title=f"Accuracy by layer ({self.values.depth} blocks)", xlim=(-0.3, max(x) + 0.3), ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend([axes])
        return figure


# ---- classifiers -----------------------------------------------------------------------------------------------------

Feed = Iterable[tuple[Tensor, Tensor]]
"""Training batches: features (S, B, D) and labels (B,)."""


def kept_feed(train: Features, options: ProbeOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of kept features, epoch by epoch; a last incomplete one is left out."""
    count, size = len(train.labels), min(options.batch_size, len(train.labels))
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            index = order[start : start + size]
            yield train.values[:, index], train.labels[index]


def train_probes(
    feed: Feed, count: int, classes: int, options: ProbeOptions, device: str | torch.device = "cpu"
) -> dict[float, LinearProbe]:
    """Train a classifier for each state at each learning rate (given for a batch of 1,024), on ``count`` examples.

    The classifiers share batches and nothing else: the loss is the sum of theirs, as in the authors' code.

    Raises:
        DigitError: a learning rate at which they diverge.
    """
    size = min(options.batch_size, count)
    steps, scale = options.epochs * (count // size), size / AUTHORS_BATCH
    probes: dict[float, LinearProbe] = {}
    running: list[tuple[LinearProbe, torch.optim.Optimizer, Any]] = []
    for values, labels in feed:
        values, labels = values.to(device), labels.to(device)
        if not running:
            shape = LinearProbeConfig(dim=values.shape[2], states=len(values), classes=classes)
            for lr in options.lrs:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(options.seed)
                    probes[lr] = LinearProbe(shape).to(device)
                sgd = torch.optim.SGD(probes[lr].parameters(), lr=lr * scale, momentum=options.momentum)
                running.append((probes[lr], sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)))
        for probe, optimizer, schedule in running:
            logits = probe(values)  # (S, B, C)
            # the sum of the states' means
            loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(values))) * len(values)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    for lr, probe in probes.items():
        if not all(bool(torch.isfinite(p).all()) for p in probe.parameters()):
            raise DigitError(f"The probe diverged at lr {lr}; give a lower one, or standardize the features.")
        probe.eval()
    return probes


@torch.inference_mode()
def top1(probe: LinearProbe, features: Features) -> list[float]:
    """The share of images classified rightly, for each state."""
    device = next(probe.parameters()).device
    right = torch.zeros(len(features.values), dtype=torch.long)
    for start in range(0, len(features.labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = probe(features.values[:, part].to(device)).argmax(-1).cpu()  # (S, r)
        right += (found == features.labels[part]).sum(1)
    return [int(count) / len(features.labels) for count in right]


Probed = tuple[list[ProbeScore], dict[float, LinearProbe]]
"""A score for each state, and the probe (of all states) of each learning rate."""


def _scored(probes: dict[float, LinearProbe], test: Features, train: Features | None, options: ProbeOptions) -> Probed:
    """With k-NN where the training features were kept."""
    found, scores = {lr: top1(probe, test) for lr, probe in probes.items()}, []
    for state, values in enumerate(test.values):
        knn = None
        if options.neighbours and train is not None:
            how = (options.neighbours, options.temperature)
            knn = neighbour_accuracy(train.values[state], train.labels, values, test.labels, *how)
        accuracy, lr = max((values[state], lr) for lr, values in found.items())
        scores.append(ProbeScore(state, accuracy, lr, {str(lr): values[state] for lr, values in found.items()}, knn))
    return scores, probes


def score_features(
    train: Features, test: Features, classes: int, options: ProbeOptions, device: str | torch.device = "cpu"
) -> Probed:
    """Train on kept features, and test."""
    if options.standardize:
        mean, deviation = train.values.mean(1, keepdim=True), train.values.std(1, keepdim=True).clamp(min=1e-6)
        train, test = (Features((part.values - mean) / deviation, part.labels) for part in (train, test))
    probes = train_probes(kept_feed(train, options), len(train.labels), classes, options, device)
    return _scored(probes, test, train, options)


# ---- the whole measurement -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeData:
    """Labelled images that a probe learns from and others that it is tested on.

    ``views`` and ``seed`` are those of :func:`collect_features`; with ``fresh`` every epoch has new crops and no
    training feature is kept; ``cache`` is a folder for features, None keeps none.
    """

    train: ImageDataset
    test: ImageDataset
    views: int = 0
    seed: int = 0
    batch_size: int = 64
    cache: Path | None = None
    fresh: bool = False

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.train.classes) or int(self.train.labels.max()) + 1

    def features(self, pipe: DigitPipeline, kind: str, model: Mapping[str, Any]) -> tuple[Features, Features]:
        """Features "prior" or "encoder" of both parts, cached for this model (:func:`describe_model`) and data."""
        return self._kept(pipe, kind, model, "train"), self._kept(pipe, kind, model, "test")

    def _kept(self, pipe: DigitPipeline, kind: str, model: Mapping[str, Any], name: str) -> Features:
        dataset, views = (self.train, self.views) if name == "train" else (self.test, 0)
        parts = ("encoder", "codebook", "prior") if pipe.space == "semantic" else ("vqgan", "prior")
        weights = [model["parts"][part]["sha256"] for part in parts if part in model["parts"]]
        seed, cut = self.seed if views else 0, to_dict(crops(pipe)[0 if views else 1])
        made_from = {"model": weights, "data": dataset.fingerprint, "views": views, "seed": seed, "crop": cut}

        collect = partial(collect_features, pipe, dataset, FEATURES[kind], views, self.batch_size, self.seed)
        if self.cache is None:
            return collect()
        file = "features.safetensors"

        def keep(folder: Path) -> None:
            write_tensors(folder / file, vars(collect()))

        step = Steps(self.cache).run(f"features-{kind}", made_from, keep)
        return Features(**read_tensors(step.folder / file))

    def score(
        self, pipe: DigitPipeline, kind: str, model: Mapping[str, Any], options: ProbeOptions, last: bool = True
    ) -> Probed:
        """Probe "prior" or "encoder"; without ``last`` its last state is left out."""
        stop = None if last else -1
        if not self.fresh:
            train, test = (Features(f.values[:stop], f.labels) for f in self.features(pipe, kind, model))
            return score_features(train, test, self.classes, options, pipe.device)
        size = min(options.batch_size, len(self.train))
        steps = options.epochs * (len(self.train) // size)
        feed = fresh_feed(pipe, self.train, FEATURES[kind], size, steps, self.batch_size, options.seed)
        cut = ((values[:stop], labels) for values, labels in feed)
        probes = train_probes(cut, len(self.train), self.classes, options, pipe.device)
        test = self._kept(pipe, kind, model, "test")
        return _scored(probes, Features(test.values[:stop], test.labels), None, options)


def split_off(dataset: ImageDataset, share: float, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """A training and a validation part of one data set: ``share`` of its images, drawn at random, go to the second."""
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise DigitError(
            f"A share of {share} of {len(dataset)} images leaves nothing on one side; give one between 0 and 1."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.subset(np.sort(order[count:])), dataset.subset(np.sort(order[:count]))


def preset_options(preset: Mapping[str, Any], train: ImageDataset) -> dict[str, Any]:
    """The fields of :class:`ProbeOptions` that a preset such as ``imagenet256-linear-probe`` gives for these images.

    Raises:
        DigitError: it is of another kind, or asks for what a probe does not do.
    """
    if preset.get("component") != "probe":
        raise DigitError(f"The preset trains '{preset.get('component')}'; expected one of a probe.")
    training, images = preset["training"], preset["data"]
    fixed = {"optimizer": "sgd", "schedule": "cosine", "weight_decay": 0, "warmup_steps": 0, "label_smoothing": 0}
    other = [name for name, value in fixed.items() if training[name] != value]
    other += [name for name, value in {"crop": "random-resized", "flip": True}.items() if images[name] != value]
    if other:
        raise DigitError(
            f"The preset has another {' and '.join(other)} than the authors' probe, which is not supported."
        )
    epochs = max(1, round(training["steps"] * training["batch_size"] / len(train)))
    same = {name: training[name] for name in ("batch_size", "momentum", "seed")}
    return {"epochs": epochs, "lrs": (training["lr"],), **same}


@timed
def probe(
    pipe: DigitPipeline,
    data: ProbeData,
    out: str | Path,
    options: ProbeOptions | None = None,
    layers: str = "paper",
    encoder: bool = True,
) -> Probe:
    """Probe a model's prior; the classifiers of the first learning rate go to ``out/probe``.

    Args:
        layers: "paper" leaves the last block's output out, as the authors do; "all" probes it too.
        encoder: also probe the encoder's own features.

    Raises:
        DigitError: no prior, no labels, a learning rate at which a probe diverges, or fresh crops that are to be
            standardized.
    """
    options, out = options or ProbeOptions(), Path(out)
    if layers not in ("paper", "all"):
        raise DigitError(f"The layers '{layers}' were asked for; expected paper or all.")
    if data.fresh and (options.standardize or data.views):
        raise DigitError(
            "Fresh crops keep no features, so there is nothing to standardize and there are no fixed views."
        )
    model = describe_model(pipe)
    scores, probes = data.score(pipe, "prior", model, options, last=layers == "all")
    ceiling = None
    if encoder and pipe.space == "semantic":
        ceiling = data.score(pipe, "encoder", model, options)[0][0]
    lr = options.lrs[0]
    probes[lr].provenance = {"lr": lr, "model": model, "data": data.train.fingerprint}
    probes[lr].cpu().save_pretrained(out / "probe")
    cuts = dict(zip(("train", "test"), map(to_dict, crops(pipe)), strict=True))
    how = {"layers": layers, "views": data.views, "fresh_crops": data.fresh, "seed_views": data.seed, "crops": cuts}
    return Probe(
        title="Linear probe of the prior, layer by layer (Table 2, figure 3b)",
        values=ProbeValues(tuple(scores), ceiling, 1 / data.classes, pipe.part("prior").config.backbone.depth),
        settings={**to_dict(options), **how},
        model=model,
        data={
            "train": describe_data(data.train, pipe),
            "test": describe_data(data.test, pipe),
            "classes": data.classes,
        },
        paper={"source": f"{paper.SOURCE}, Table 2: ImageNet top-1, %", "rows": [row._asdict() for row in paper.PROBE]},
        notes=_notes(options, data, crops(pipe)[1]),
    )


def _notes(options: ProbeOptions, data: ProbeData, test: Transform) -> tuple[str, ...]:
    how = f"{data.views} random resized crops with flips" if data.views else "one view, the middle"
    how = "new random resized crops with flips in each epoch" if data.fresh else how
    size = min(options.batch_size, len(data.train) * max(data.views, 1))
    notes = [
        f"{len(data.train):,} training images ({how}), {len(data.test):,} validation images (the middle {test.size} px "
        f"of {test.resize}), {options.epochs} epochs of SGD in batches of {size}; learning rates are given for a batch "
        f"of {AUTHORS_BATCH}.",
    ]
    if not data.fresh:
        notes.append("The authors draw new crops in each of 80 epochs; kept features have a fixed set of views.")
    if len(options.lrs) > 1:
        notes.append(
            "The best learning rate is chosen on the validation images, so its accuracy is slightly optimistic."
        )
    if options.standardize:
        notes.append("Features were standardized, which the authors' protocol does not do.")
    return tuple(notes)
