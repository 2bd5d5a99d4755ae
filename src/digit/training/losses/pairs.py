"""Learning from two views of an image: SimCLR and VICReg, with lightly's losses.

Sources: [0] Chen et al. 2020, arXiv 2002.05709. [1] Bardes et al. 2021, arXiv 2105.04906.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from digit.core.config import Positive, PositiveInt, config
from digit.core.errors import require
from digit.training.losses.projection import Method, Projection, TrainableEncoder, check_trainable, exact
from digit.training.task import Batch, Step
from digit.training.views import ViewDraws, Views, apply_views, draw_views


@config
class PairObjective:
    """Two views of an image should be projected alike, those of different images apart: by contrast within the batch
    ("simclr"), or by variance and covariance of the batch, without negatives ("vicreg"). The fields are explained in
    ``presets/bases/cifar10-simclr.yaml``.
    """

    method: Literal["simclr", "vicreg"] = "simclr"
    views: Views = Views()
    hidden: PositiveInt = 512
    dim: PositiveInt = 128
    temperature: Positive = 0.2


class PairMethod(Method):
    """SimCLR or VICReg on an encoder."""

    def __init__(self, encoder: TrainableEncoder, objective: PairObjective) -> None:
        check_trainable(encoder, masks=False)
        heads = require("lightly.models.modules.heads", "train", "training an encoder")
        losses = require("lightly.loss", "train", "training an encoder")
        self.encoder, self.objective = encoder, objective
        head = heads.SimCLRProjectionHead(encoder.dim, objective.hidden, objective.dim)
        self.modules: dict[str, nn.Module] = {"student": Projection(encoder, head)}
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        contrast = partial(losses.NTXentLoss, objective.temperature)
        self.criterion = (contrast if objective.method == "simclr" else losses.VICRegLoss)(gather_distributed=several)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of both views."""
        return drawn_views(count, [self.objective.views] * 2, generator)

    def loss(
        self, modules: nn.ModuleDict, images: Tensor, batch: Batch, _step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of images (B, 3, S, S) in 0..1, and metrics."""
        views = [apply_views(images, taken(batch, f"view{i}"), self.objective.views.size) for i in range(2)]
        projections, vectors = modules["student"](torch.cat(views))  # (2 B, P), (2 B, D)
        with exact(images):
            loss: Tensor = self.criterion(*projections.chunk(2))
        return loss, {"feature_spread": spread(vectors)}


def drawn_views(count: int, kinds: Sequence[Views], generator: torch.Generator) -> Batch:
    """The draws of several views, as tensors of a batch."""
    drawn = [draw_views(count, views, generator) for views in kinds]
    return {f"view{i}.{name}": value for i, draws in enumerate(drawn) for name, value in draws._asdict().items()}


def taken(batch: Batch, prefix: str) -> ViewDraws:
    """The draws of one view, out of a batch."""
    return ViewDraws(*(batch[f"{prefix}.{name}"] for name in ViewDraws._fields))


def spread(vectors: Tensor) -> Tensor:
    """How spread unit vectors (B, D) are: the root of their mean variance times D; 1 uniformly spread, 0 collapsed."""
    unit = nn.functional.normalize(vectors.detach(), dim=1)
    return unit.var(0).sum().sqrt()
