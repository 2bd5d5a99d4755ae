"""Learning from two views of an image: SimCLR and VICReg, with lightly's losses.

Sources: [0] Chen et al. 2020, arXiv 2002.05709. [1] Bardes et al. 2021, arXiv 2105.04906. The dense term contrasts
patches as [2] Wang et al. 2021, arXiv 2011.09157 (DenseCL) does, between places that both views show, which are matched
by their location as in [3] Bardes et al. 2022, arXiv 2210.01571 (VICRegL).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from digit.core.config import NonNegative, Positive, PositiveInt, config
from digit.core.errors import require
from digit.training.losses.projection import Method, Projection, TrainableEncoder, check_trainable, exact
from digit.training.task import Batch, Step
from digit.training.views import ViewDraws, Views, apply_views, draw_views


@config
class PairObjective:
    """Two views of an image should be projected alike, those of different images apart.

    Attributes:
        method: "simclr" (contrast within the batch) or "vicreg" (variance and covariance of the batch, no negatives).
        views: how both views are made.
        hidden: width of the projection head's hidden layer.
        dim: width of the projections.
        temperature: of SimCLR's softmax.
        dense: weight of the dense term: patches at one place of the image are projected alike in both views, and apart
            from all other patches of the batch. 0 leaves it out.
        dense_places: how many places of an image the dense term compares.
    """

    method: Literal["simclr", "vicreg"] = "simclr"
    views: Views = Views()
    hidden: PositiveInt = 512
    dim: PositiveInt = 128
    temperature: Positive = 0.2
    dense: NonNegative = 0.0
    dense_places: PositiveInt = 4


class PairMethod(Method):
    """SimCLR or VICReg on an encoder."""

    def __init__(self, encoder: TrainableEncoder, objective: PairObjective) -> None:
        check_trainable(encoder, masks=False)
        heads = require("lightly.models.modules.heads", "train", "training an encoder")
        losses = require("lightly.loss", "train", "training an encoder")
        self.encoder, self.objective = encoder, objective
        shape = encoder.dim, objective.hidden, objective.dim
        head = heads.SimCLRProjectionHead(*shape)
        dense_head = heads.SimCLRProjectionHead(*shape) if objective.dense else None
        self.modules: dict[str, nn.Module] = {"student": Projection(encoder, head, dense_head)}
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        contrast = partial(losses.NTXentLoss, objective.temperature)
        self.criterion = (contrast if objective.method == "simclr" else losses.VICRegLoss)(gather_distributed=several)
        self.dense_criterion = contrast()
        # patches of a view's row
        self.side = encoder.grid[0] * objective.views.size // encoder.preprocessing.image_size

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of both views and, for the dense term, an order of a view's patches (count, N)."""
        drawn = drawn_views(count, [self.objective.views] * 2, generator)
        if self.objective.dense:
            drawn["order"] = torch.rand(count, self.side**2, generator=generator)
        return drawn

    def loss(
        self, modules: nn.ModuleDict, images: Tensor, batch: Batch, _step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of images (B, 3, S, S) in 0..1, and metrics."""
        size = self.objective.views.size
        views = [apply_views(images, taken(batch, f"view{i}"), size) for i in range(2)]
        take = None
        if self.objective.dense:
            crops = [taken(batch, f"view{i}").crop for i in range(2)]
            with exact(images):
                take = matched_places(crops[0], crops[1], batch["order"], self.side, self.objective.dense_places)
        projections, vectors, *patches = modules["student"](torch.cat(views), take=take)  # (2 B, P), (2 B, D), (2 n, P)
        metrics = {"feature_spread": spread(vectors)}
        with exact(images):
            loss: Tensor = self.criterion(*projections.chunk(2))
            if take is not None and len(take):
                dense = self.dense_criterion(*patches[0].chunk(2))
                loss, metrics = loss + self.objective.dense * dense, {**metrics, "dense": dense.detach()}
        return loss, metrics


def matched_places(first: Tensor, second: Tensor, order: Tensor, side: int, places: int) -> Tensor:
    """Patches of two views that show the same place of an image.

    A patch of the first view is matched with the patch of the second whose centre is nearest in the image, where that
    is at most one patch of the first view away. At most ``places`` of an image are taken.

    Args:
        first, second: the views' crops (B, 2, 3), in ``affine_grid``'s coordinates.
        order: (B, N) which patches of the first view are preferred, lowest first; N = side * side.

    Returns:
        (2 n,) indices into the 2 B * N patches of all first views and then all second ones: n patches of first views,
        then their matches in the same order.
    """
    line = (torch.arange(side, device=order.device) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, N) centres, in the view's -1..1
    a, b = (crop @ grid for crop in (first, second))  # (B, 2, N) the same, in the image's
    distance, match = torch.cdist(a.mT, b.mT).min(2)  # (B, N)
    patch = first[:, :, :2].abs().sum(2).amin(1) * 2 / side  # (B,) the shorter side of a patch of the first view
    allowed = distance <= patch[:, None]
    rank = torch.where(allowed, order, 2.0).argsort(1)[:, :places]  # (B, places)
    image, column = torch.nonzero(allowed.gather(1, rank), as_tuple=True)
    chosen = rank[image, column]
    count = order.shape[1]
    return torch.cat([image * count + chosen, (len(order) + image) * count + match[image, chosen]])


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
