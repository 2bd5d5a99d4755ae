"""What a frozen prior knows: a linear classifier on the mean of each layer's states (the paper's Table 2 and figure 3b).

The authors' protocol (DAMO-NLP-SG/DiGIT at cd6d8ca): classifier n reads state n averaged over all 1 + N positions, the
embedding is state 0 and the last block's output is left out; SGD with momentum 0.9, lr 0.4 at a batch of 1,024, cosine
to 0, no weight decay, no norm. Here the features are computed once and kept, so every layer and learning rate costs
minutes. The prior is given no class label.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from digit.core.config import config, to_dict
from digit.core.errors import DigitError
from digit.core.files import write_file
from digit.core.progress import bar
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset
from digit.data.sampling import Batches, OrderedSampler
from digit.evaluation import paper
from digit.evaluation.model_source import describe_data, pipe_size, prior_tokens
from digit.evaluation.results import OTHER, OURS, PAPER, Result, Rows, legend, panels
from digit.models.probe import LinearProbe, LinearProbeConfig, mean_states
from digit.models.transformer import PositiveInt, Probability
from digit.pipeline.card import describe_model
from digit.pipeline.pipeline import DigitPipeline
from digit.training.neighbours import neighbour_accuracy

AUTHORS_LR, AUTHORS_BATCH = 0.4, 1024
_CHUNK = 4096  # images classified at a time


@config
class ProbeOptions:
    """How the classifiers are trained.

    Attributes:
        epochs: passes over the training features. The authors: 80.
        batch_size: examples a step.
        lrs: learning rates at a batch of 1,024, scaled linearly to ``batch_size``; every layer is trained with each.
        momentum: of SGD.
        standardize: bring every feature to mean 0 and deviation 1 over the training images. Not the authors' protocol,
            but it makes one learning rate serve layers of different scale.
        neighbours: of the k-NN check; 0 leaves it out.
        temperature: of its votes' weights, exp(cosine / temperature); infinity counts every neighbour alike.
        seed: of weights and order.
    """

    epochs: PositiveInt = 80
    batch_size: PositiveInt = 1024
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
        """A row for each layer, and the encoder's last."""
        named = [(f"state {s.state}" + " (embedding)" * (s.state == 0), s) for s in self.values.layers]
        named += [("encoder", self.values.encoder)] if self.values.encoder else []
        return [
            {
                "Features": name,
                "Top-1, %": f"{100 * score.accuracy:.2f}",
                "Best learning rate": score.lr,
                "k-NN, %": None if score.knn is None else f"{100 * score.knn:.2f}",
            }
            for name, score in named
        ]

    def figure(self) -> Any:
        """Accuracy by layer."""
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


# ---- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Features of labelled images, kept so that probes are cheap: a (n, D) float32 matrix a state, and (n,) labels."""

    values: Tensor  # (S, n, D)
    labels: Tensor  # (n,) int64

    def save(self, path: str | Path, made_from: dict[str, Any]) -> Path:
        """Write an ``.npz`` of ``values``, ``labels`` and the JSON text ``made_from``."""
        arrays = {"values": self.values.numpy(), "labels": self.labels.numpy(), "made_from": json.dumps(made_from)}

        def write(aside: Path) -> None:
            with open(aside, "wb") as handle:
                np.savez(handle, **arrays)  # type: ignore[arg-type]

        return write_file(path, write)

    @classmethod
    def load(cls, path: str | Path, made_from: dict[str, Any]) -> Features | None:
        """Read what :meth:`save` wrote; None where there is no such file or it was made from something else."""
        if not Path(path).is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["made_from"]) != json.dumps(made_from):
                return None
            return cls(torch.from_numpy(arrays["values"]), torch.from_numpy(arrays["labels"]))


def prior_features(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """Mean states (L + 1, B, D) of the prior over images (B, 3, S, S): all positions, the start included."""
    prior = pipe.part("prior")
    return mean_states(prior.states(prior_tokens(pipe, images)))


def encoder_features(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """The encoder's features averaged over the patches, (1, B, D): the ceiling of what its tokens can carry."""
    return pipe.tokenizer.features(images).float().mean(1)[None]


@torch.inference_mode()
def collect_features(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    of: Callable[[DigitPipeline, Tensor], Tensor] = prior_features,
    views: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> Features:
    """Run a frozen network over labelled images once.

    Args:
        of: :func:`prior_features` or :func:`encoder_features`.
        views: 0 takes each image once, its middle; k takes k random resized crops (8% to 100% of the area) with flips,
            which is how the authors augment, only that they draw new ones in each of 80 epochs.
        seed: of the crops.

    Raises:
        DigitError: images without labels.
    """
    if (dataset.labels < 0).any():
        raise DigitError(f"{dataset.name} {dataset.split} has images without a class; a probe needs one for each.")
    size = pipe_size(pipe)
    cut = Transform(size=size, crop="random-resized", flip=True, scale=(0.08, 1.0)) if views else Transform(size=size)
    order = OrderedSampler(len(dataset), batch_size)
    values, labels = [], []
    with bar(f"Features of {dataset.name} {dataset.split}", len(dataset) * max(views, 1)) as progress:
        for view in range(max(views, 1)):
            for batch in Batches(dataset, order, cut, seed=seed + view):
                values.append(of(pipe, batch.images.to(pipe.device)).cpu())
                labels.append(batch.labels)
                progress.advance(len(batch.labels))
    return Features(torch.cat(values, 1), torch.cat(labels))


# ---- classifiers -----------------------------------------------------------------------------------------------------


def train_probe(
    train: Features, classes: int, lr: float, options: ProbeOptions, device: str | torch.device = "cpu"
) -> LinearProbe:
    """Train a classifier for each state at one learning rate (given for a batch of 1,024).

    The classifiers share batches and nothing else: the loss is the sum of theirs, as in the authors' code.
    """
    states, count, dim = train.values.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        probe = LinearProbe(LinearProbeConfig(dim=dim, states=states, classes=classes)).to(device)
    size = min(options.batch_size, count)
    steps = options.epochs * (count // size)
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr * size / AUTHORS_BATCH, momentum=options.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    values, labels = train.values.to(device), train.labels.to(device)
    for index in _batches(count, size, options):
        logits = probe(values[:, index])  # (S, B, C)
        loss = (
            F.cross_entropy(logits.flatten(0, 1), labels[index].repeat(states)) * states
        )  # the sum of the states' means
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if not all(bool(torch.isfinite(p).all()) for p in probe.parameters()):
        raise DigitError(f"The probe diverged at lr {lr}; give a lower one, or standardize the features.")
    return probe.eval()


def _batches(count: int, size: int, options: ProbeOptions) -> Iterator[Tensor]:
    """Shuffled batches of every epoch; a last incomplete one is left out."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


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


def score_features(
    train: Features, test: Features, classes: int, options: ProbeOptions, device: str | torch.device = "cpu"
) -> tuple[list[ProbeScore], dict[float, LinearProbe]]:
    """A score for each state, and the probe (of all states) of each learning rate."""
    if options.standardize:
        train, test = _standardized(train, test)
    probes = {}
    with bar("Linear probes", len(options.lrs), "learning rates") as progress:
        for lr in options.lrs:
            probes[lr] = train_probe(train, classes, lr, options, device)
            progress.advance()
    found = {lr: top1(probe, test) for lr, probe in probes.items()}
    scores = []
    for state, (a, b) in enumerate(zip(train.values, test.values, strict=True)):
        knn = None
        if options.neighbours:
            knn = neighbour_accuracy(a, train.labels, b, test.labels, options.neighbours, options.temperature)
        accuracy, lr = max((values[state], lr) for lr, values in found.items())
        scores.append(ProbeScore(state, accuracy, lr, {str(lr): values[state] for lr, values in found.items()}, knn))
    return scores, probes


def _standardized(train: Features, test: Features) -> tuple[Features, Features]:
    mean, deviation = train.values.mean(1, keepdim=True), train.values.std(1, keepdim=True).clamp(min=1e-6)
    return tuple(Features((f.values - mean) / deviation, f.labels) for f in (train, test))  # type: ignore[return-value]


# ---- the whole measurement -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeData:
    """Labelled images that a probe learns from and others that it is tested on.

    ``views`` and ``seed`` are those of :func:`collect_features`; ``cache`` is a folder for the features, None keeps none.
    """

    train: ImageDataset
    test: ImageDataset
    views: int = 0
    seed: int = 0
    batch_size: int = 64
    cache: Path | None = None

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.train.classes) or int(self.train.labels.max()) + 1

    def features(self, pipe: DigitPipeline, kind: str, model: dict[str, Any]) -> tuple[Features, Features]:
        """Features "prior" or "encoder" of both parts, cached for this model (:func:`describe_model`) and these images."""
        of = {"prior": prior_features, "encoder": encoder_features}[kind]
        parts = ("encoder", "codebook", "prior") if pipe.space == "semantic" else ("vqgan", "prior")
        weights = [model["parts"][part]["sha256"] for part in parts if part in model["parts"]]
        found = []
        for name, dataset, views in (("train", self.train, self.views), ("test", self.test, 0)):
            seed = self.seed if views else 0
            made_from = {"model": weights, "data": dataset.fingerprint, "views": views, "seed": seed}
            path = self.cache / f"features-{kind}-{name}.npz" if self.cache else None
            features = Features.load(path, made_from) if path else None
            if features is None:
                features = collect_features(pipe, dataset, of, views, self.batch_size, self.seed)
                if path:
                    features.save(path, made_from)
            found.append(features)
        return found[0], found[1]


def split_off(dataset: ImageDataset, share: float, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """A training and a validation part of one data set: ``share`` of its images, drawn at random, go to the second."""
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise DigitError(
            f"A share of {share} of {len(dataset)} images leaves nothing on one side; give one between 0 and 1."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.subset(np.sort(order[count:])), dataset.subset(np.sort(order[:count]))


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
        DigitError: no prior, no labels, or a learning rate at which a probe diverges.
    """
    options, began, out = options or ProbeOptions(), time.monotonic(), Path(out)
    if layers not in ("paper", "all"):
        raise DigitError(f"The layers '{layers}' were asked for; expected paper or all.")
    classes = data.classes
    model = describe_model(pipe)
    train, test = data.features(pipe, "prior", model)
    if layers == "paper":
        train, test = (Features(f.values[:-1], f.labels) for f in (train, test))
    scores, probes = score_features(train, test, classes, options, pipe.device)
    ceiling = None
    if encoder and pipe.space == "semantic":
        ceiling = score_features(*data.features(pipe, "encoder", model), classes, options, pipe.device)[0][0]
    lr = options.lrs[0]
    probes[lr].provenance = {"lr": lr, "model": model, "data": data.train.fingerprint}
    probes[lr].cpu().save_pretrained(out / "probe")
    return Probe(
        title="Linear probe of the prior, layer by layer (Table 2, figure 3b)",
        values=ProbeValues(tuple(scores), ceiling, 1 / classes, pipe.part("prior").config.transformer.depth),
        settings={**to_dict(options), "layers": layers, "views": data.views, "seed_views": data.seed},
        model=model,
        data={"train": describe_data(data.train), "test": describe_data(data.test), "classes": classes},
        paper={"source": f"{paper.SOURCE}, Table 2: ImageNet top-1, %", "rows": [row._asdict() for row in paper.PROBE]},
        notes=_notes(options, data),
        seconds=time.monotonic() - began,
    )


def _notes(options: ProbeOptions, data: ProbeData) -> tuple[str, ...]:
    how = f"{data.views} random resized crops with flips" if data.views else "one view, the middle"
    size = min(options.batch_size, len(data.train) * max(data.views, 1))
    notes = [
        f"{len(data.train):,} training images ({how}), {len(data.test):,} validation images, {options.epochs} epochs of "
        f"SGD in batches of {size}; learning rates are given for a batch of {AUTHORS_BATCH}.",
        "The authors draw new crops in each of 80 epochs; kept features have a fixed set of views.",
    ]
    if len(options.lrs) > 1:
        notes.append(
            "The best learning rate is chosen on the validation images, so its accuracy is slightly optimistic."
        )
    if options.standardize:
        notes.append("Features were standardized, which the authors' protocol does not do.")
    return tuple(notes)
