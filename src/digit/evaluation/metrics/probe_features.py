"""The features that a linear probe learns from: how images are cut, and the frozen networks' states of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.progress import bar, track
from digit.core.transforms import Transform
from digit.data.dataset import ImageDataset
from digit.data.sampling import Batches, OrderedSampler, StepSampler
from digit.evaluation.model_source import pipe_size
from digit.models.probe import mean_states
from digit.pipeline.pipeline import DigitPipeline


@dataclass(frozen=True)
class Features:
    """Features of labelled images, kept so that probes are cheap: a (n, D) float32 matrix a state, and (n,) labels."""

    values: Tensor  # (S, n, D)
    labels: Tensor  # (n,) int64


Of = Callable[[DigitPipeline, Tensor], Tensor]
"""Images to the features (S, B, D) that are probed."""


def prior_features(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """Mean states (L + 1, B, D) of the prior over images (B, 3, S, S): all positions, the start included."""
    if pipe.space != "semantic":
        return mean_states(pipe.part("prior").states(pipe.prior_tokenizer.encode(images)))
    features = pipe.part("encoder")(images)  # which, unlike the tokenizer, also takes the size that it sees
    return mean_states(pipe.part("prior").states(pipe.part("codebook").tokens(features)))


def encoder_features(pipe: DigitPipeline, images: Tensor) -> Tensor:
    """The encoder's features averaged over the patches, (1, B, D): the ceiling of what its tokens can carry."""
    return pipe.part("encoder")(images).float().mean(1)[None]  # type: ignore[no-any-return]


FEATURES: dict[str, Of] = {"prior": prior_features, "encoder": encoder_features}


def crops(pipe: DigitPipeline) -> tuple[Transform, Transform]:
    """How training and validation images are cut, for a model that takes images of S pixels and whose encoder sees s of
    them: 8% to 100% of the area scaled to S, half of them mirrored; and the middle s of the shorter side scaled to S.
    """
    size = pipe_size(pipe)
    seen = pipe.encoder.preprocessing.resize if pipe.space == "semantic" and pipe.encoder is not None else None
    train = Transform(size=size, crop="random-resized", flip=True, scale=(0.08, 1.0))
    return train, Transform(size=min(seen or size, size), resize=size)


def _check_labels(dataset: ImageDataset) -> None:
    if (dataset.labels < 0).any():
        raise DigitError(f"{dataset.name} {dataset.split} has images without a class; a probe needs one for each.")


@torch.inference_mode()
def collect_features(
    pipe: DigitPipeline,
    dataset: ImageDataset,
    of: Of = prior_features,
    views: int = 0,
    batch_size: int = 64,
    seed: int = 0,
) -> Features:
    """Run a frozen network over labelled images once.

    Args:
        of: :func:`prior_features` or :func:`encoder_features`.
        views: 0 takes each image once, its middle; k takes k random resized crops with flips, see :func:`crops`.
        seed: of the crops.

    Raises:
        DigitError: images without labels.
    """
    _check_labels(dataset)
    cut = crops(pipe)[0 if views else 1]
    order = OrderedSampler(len(dataset), batch_size)
    values, labels = [], []
    with bar(f"Features of {dataset.name} {dataset.split}", len(dataset) * max(views, 1)) as progress:
        for view in range(max(views, 1)):
            for batch in Batches(dataset, order, cut, seed=seed + view):
                values.append(of(pipe, batch.images.to(pipe.device)).cpu())
                labels.append(batch.labels)
                progress.advance(len(batch.labels))
    return Features(torch.cat(values, 1), torch.cat(labels))


def fresh_feed(
    pipe: DigitPipeline, dataset: ImageDataset, of: Of, size: int, steps: int, batch_size: int = 64, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` shuffled batches of ``size`` images with new random crops in every epoch; the frozen network sees
    ``batch_size`` at a time.
    """
    _check_labels(dataset)
    order = StepSampler(len(dataset), size, seed)
    for batch in track(Batches(dataset, order, crops(pipe)[0], seed=seed, stop=steps), "Linear probe", steps, "steps"):
        with torch.no_grad():
            parts = [of(pipe, part.to(pipe.device)) for part in torch.split(batch.images, batch_size)]
        yield torch.cat(parts, 1), batch.labels
