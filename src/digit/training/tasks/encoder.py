"""Training an encoder for small images, self-supervised: SimCLR, VICReg, DINO with iBOT, or a masked autoencoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.config import NonNegativeInt, PositiveInt, config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.data.dataset import ImageDataset
from digit.encoders.loading import load_encoder, small_conv, small_vit
from digit.training.finetune import FineTune, saved_part, take_modules
from digit.training.losses.encoders import (
    DistillationMethod,
    DistillationObjective,
    MaskedAutoencoderMethod,
    MaskedAutoencoderObjective,
    Method,
    PairMethod,
    PairObjective,
    TrainableEncoder,
    spread,
)
from digit.training.task import Batch, Groups, Loss, Step, Stream, Task
from digit.training.tasks.images import ImageData, described, image_batches, image_chunks, some_images


@config
class ConvModel:
    """A new convolutional encoder; see :func:`digit.encoders.loading.small_conv`."""

    kind: Literal["conv"] = "conv"
    image_size: PositiveInt = 32
    widths: tuple[PositiveInt, ...] = (32, 96, 192)
    blocks: tuple[PositiveInt, ...] = (1, 1, 2)
    norm: Literal["batch", "group"] = "batch"

    def build(self) -> TrainableEncoder:
        """The network, with random weights."""
        return small_conv(self.image_size, widths=self.widths, blocks=self.blocks, norm=self.norm)


@config
class VitModel:
    """A new ViT; see :func:`digit.encoders.loading.small_vit`."""

    kind: Literal["vit"] = "vit"
    image_size: PositiveInt = 32
    patch: PositiveInt = 4
    dim: PositiveInt = 192
    depth: PositiveInt = 6
    heads: PositiveInt = 3

    def build(self) -> TrainableEncoder:
        """The network, with random weights."""
        return small_vit(self.image_size, self.patch, self.dim, self.depth, self.heads)


@config
class EncoderData(ImageData):
    """Which images are learned from, and which are classified by their neighbours, ``memory`` training images (0: all);
    without classes only the spread of their features is measured.
    """

    memory: NonNegativeInt = 10000


_CHUNK = 1000  # queries at a time
Model = ConvModel | VitModel
Objective = PairObjective | DistillationObjective | MaskedAutoencoderObjective
_MODELS: dict[str, type[Model]] = {"conv": ConvModel, "vit": VitModel}
_OBJECTIVES: dict[str, type[Objective]] = {
    "simclr": PairObjective,
    "vicreg": PairObjective,
    "dino": DistillationObjective,
    "mae": MaskedAutoencoderObjective,
}


def model_from(values: Mapping[str, Any], where: str) -> Model:
    """The ``model`` section of an encoder preset; a DigitError for an unknown kind or a wrong field."""
    model: Model = _chosen(_MODELS, values, "kind", where)
    return model


def objective_from(values: Mapping[str, Any], where: str) -> Objective:
    """The ``objective`` section of an encoder preset; a DigitError for an unknown method or a wrong field."""
    objective: Objective = _chosen(_OBJECTIVES, values, "method", where)
    return objective


def _chosen(known: Mapping[str, type[Any]], values: Mapping[str, Any], field: str, where: str) -> Any:
    name = str(values.get(field))
    if name not in known:
        raise DigitError(f"{where} has {field} {values.get(field)!r}; expected one of {', '.join(known)}.")
    return from_dict(known[name], values, where)


def build_method(model: Model, objective: Objective) -> Method:
    """The networks and losses of an encoder's training, with random weights."""
    if isinstance(objective, PairObjective):
        return PairMethod(model.build(), objective)
    if isinstance(objective, MaskedAutoencoderObjective):
        return MaskedAutoencoderMethod(model.build(), objective)
    return DistillationMethod(model.build(), model.build(), objective)


def neighbour_accuracy(
    memory: Tensor,
    memory_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of the queries (m, D), of classes ``labels`` (m,), whose class wins the vote of their nearest neighbours
    among the features ``memory`` (n, D), of classes ``memory_labels`` (n,). A vote counts exp(cosine / temperature): Wu
    et al. 2018, arXiv 1805.01978, section 3.4; DINO (arXiv 2104.14294, section 4.1) found 20 neighbours best.
    """
    with torch.autocast(memory.device.type, enabled=False):
        memory = F.normalize(memory.float(), dim=1).T.contiguous()  # (D, n)
        classes = int(torch.cat([memory_labels, labels]).max()) + 1
        right = 0
        for chunk, expected in zip(torch.split(queries, _CHUNK), torch.split(labels, _CHUNK), strict=True):
            similar, nearest = (F.normalize(chunk.float(), dim=1) @ memory).topk(min(neighbours, memory.shape[1]))
            votes = similar.new_zeros(len(chunk), classes)
            votes.scatter_add_(1, memory_labels[nearest], (similar / temperature).exp())
            right += int((votes.argmax(1) == expected).sum())
    return right / len(queries)


class EncoderTask(Task):
    """An encoder in training."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        train: ImageDataset,
        held_out: ImageDataset | None = None,
        memory: int = 0,
        start: FineTune | None = None,
    ) -> None:
        """Make the encoder ``model``, or with ``start`` a saved one with the heads of its run, which learns from
        ``train`` and is measured on ``held_out``; a DigitError for another shape.
        """
        self.method = build_method(model, objective)
        self.modules = self.method.modules
        origin: dict[str, Any] = {}
        if start is not None:
            take_modules(self.modules, start.source, tuple(self.modules))
            encoder = self.method.encoder
            origin = {"start": saved_part(start, "encoder", load_encoder, encoder)}
            cast(nn.Module, self.modules["student"].encoder).load_state_dict(encoder.state_dict())
        self.train, self.examples = train, len(train)
        self.size = model.image_size
        self.memory = some_images(train, memory)
        self.held_out = held_out
        about = {"model": to_dict(model), "objective": to_dict(objective), "data": described(train)}
        self.description = {"component": "encoder", **about, **origin}

    def parameters_by_optimizer(self) -> Groups:
        """Matrices and kernels decay; biases, norms and tokens do not."""
        trained = [p for p in self.modules["student"].parameters() if p.requires_grad]
        decayed, rest = ([p for p in trained if (p.squeeze().ndim > 1) == big] for big in (True, False))
        return {"model": [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]}

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Images as uint8, and the random numbers of their views."""
        return image_batches(self.train, self.size, stream, self.method.draw)

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        value, metrics = self.method.loss(batch["images"].float() / 255, batch, step)
        yield Loss("model", value, metrics)

    def after_step(self, step: Step) -> None:
        self.method.after_step(step)

    def validate(self) -> dict[str, float]:
        """20-NN accuracy of the mean patch feature on held-out images, and how spread these are (0 is collapse)."""
        if self.held_out is None:
            return {}
        queries = self._pooled(self.held_out)
        metrics = {"feature_spread": float(spread(queries))}
        labels, known = (torch.from_numpy(d.labels).to(self.device) for d in (self.held_out, self.memory))
        if int(labels.min()) >= 0 and int(known.min()) >= 0:
            metrics["neighbour_accuracy"] = neighbour_accuracy(self._pooled(self.memory), known, queries, labels)
        return metrics

    def _pooled(self, images: ImageDataset) -> Tensor:
        """The mean feature of every image, (n, D)."""
        encoder = self.method.encoder
        return torch.cat([encoder(chunk).float().mean(1) for chunk in image_chunks(images, self.size, self.device)])

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        self.method.encoder.provenance = dict(provenance)
        self.method.encoder.save_pretrained(folder)


def build(preset: Mapping[str, Any], data: str | Path, where: str, start: FineTune | None = None) -> EncoderTask:
    """The task of an encoder preset over a dataset; see :func:`digit.training.build.build_task`."""
    model = model_from(preset["model"], f"{where}, model")
    objective = objective_from(preset["objective"], f"{where}, objective")
    choice: EncoderData = from_dict(EncoderData, preset["data"], f"{where}, data")
    return EncoderTask(model, objective, *choice.open(data), choice.memory, start)
