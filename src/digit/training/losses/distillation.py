"""Learning from a teacher that is a moving average of the student: DINO on images, iBOT on masked patches, as DINOv2
joins them.

Sources: [0] Caron et al. 2021, arXiv 2104.14294. [1] Zhou et al. 2021, arXiv 2111.07832. [2] Oquab et al. 2023, arXiv
2304.07193.
The losses and heads are lightly's.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Share, config
from digit.core.errors import DigitError, require
from digit.training.losses.pairs import drawn_views, spread, taken
from digit.training.losses.projection import Method, Projection, TrainableEncoder, check_trainable, exact
from digit.training.task import Batch, Step
from digit.training.views import Views, apply_views


@config
class DistillationObjective:
    """The student's view of an image should be assigned to the same prototypes as the teacher's other view.

    ``presets/cifar10-encoder-vit.yaml`` explains the fields. ``batch_norm`` is what convolutional networks want in the
    heads.
    """

    method: Literal["dino"] = "dino"
    views: Views = Views(scale=(0.4, 1.0))
    local_views: Views = Views(size=16, scale=(0.1, 0.4))
    local_count: NonNegativeInt = 0
    hidden: PositiveInt = 512
    bottleneck: PositiveInt = 128
    prototypes: PositiveInt = 2048
    batch_norm: bool = False
    teacher_momentum: Share = 0.99
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    temperature_warmup: Share = 0.3
    patch_weight: NonNegative = 1.0
    masked_images: Share = 0.5
    masked_share: tuple[Share, Share] = (0.1, 0.5)
    koleo_weight: NonNegative = 0.0


class DistillationMethod(Method):
    """DINO, with iBOT where ``patch_weight`` is not 0; the teacher is what is validated and exported."""

    def __init__(self, student: TrainableEncoder, teacher: TrainableEncoder, objective: DistillationObjective) -> None:
        """Take two networks of one shape; the teacher gets the student's weights."""
        check_trainable(student, masks=objective.patch_weight > 0)
        losses = require("lightly.loss", "train", "training an encoder")
        self.encoder, self.objective = teacher, objective
        first, second = objective.teacher_temperature
        self.modules: dict[str, nn.Module] = {
            "student": _with_heads(student, objective),
            "teacher": _with_heads(teacher, objective).requires_grad_(False),
            "dino": losses.DINOLoss(objective.prototypes, first, second),
            "ibot": losses.IBOTPatchLoss(objective.prototypes, second),
        }
        self.modules["teacher"].load_state_dict(self.modules["student"].state_dict())
        self.koleo = losses.KoLeoLoss()
        size = objective.views.size
        self.patches = student.grid[0] * size // student.preprocessing.image_size
        if student.grid[0] * size % student.preprocessing.image_size:
            raise DigitError(f"Views of {size} pixels are not a whole number of this encoder's patches.")

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of all views, and which patches of the large ones are hidden."""
        kinds = [self.objective.views] * 2 + [self.objective.local_views] * self.objective.local_count
        batch = drawn_views(count, kinds, generator)
        if self.objective.patch_weight:
            batch |= {f"masked{i}": self._draw_masks(count, generator) for i in range(2)}
        return batch

    def _draw_masks(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, N) bool: in some of the images, a random part of the patches."""
        low, high = self.objective.masked_share
        share = torch.rand(count, generator=generator) * (high - low) + low
        share *= torch.rand(count, generator=generator) < self.objective.masked_images
        order = torch.rand(count, self.patches**2, generator=generator).argsort(1).argsort(1)  # (B, N) ranks
        return order < (share * self.patches**2).round()[:, None]

    def loss(
        self, modules: nn.ModuleDict, images: Tensor, batch: Batch, step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of images (B, 3, S, S) in 0..1, and metrics."""
        objective = self.objective
        large = torch.cat([apply_views(images, taken(batch, f"view{i}"), objective.views.size) for i in range(2)])
        masked = torch.cat([batch["masked0"], batch["masked1"]]) if objective.patch_weight else None  # (2 B, N)
        with torch.no_grad():
            target, _, *target_patches = modules["teacher"](large, take=masked)
        projected, vectors, *patches = modules["student"](large, masked, masked)
        views = list(projected.chunk(2))  # (B, P) each
        if objective.local_count:
            small = [
                apply_views(images, taken(batch, f"view{2 + i}"), objective.local_views.size)
                for i in range(objective.local_count)
            ]
            views += modules["student"](torch.cat(small))[0].chunk(objective.local_count)
        temperature = self._temperature(step)
        with exact(images):
            loss = modules["dino"](list(target.chunk(2)), views, temperature)
            metrics = {"dino": loss.detach(), "feature_spread": spread(vectors)}
            if masked is not None:
                side = self.patches
                patch_loss = modules["ibot"](target_patches[0], patches[0], masked.view(-1, side, side), temperature)
                loss = loss + objective.patch_weight * patch_loss
                metrics["ibot"] = patch_loss.detach()
            if objective.koleo_weight:
                loss = loss + objective.koleo_weight * sum(self.koleo(v) for v in vectors.chunk(2))
        return loss, metrics

    def _temperature(self, step: Step) -> float:
        first, last = self.objective.teacher_temperature
        return first + (last - first) * min(1.0, step.progress / max(self.objective.temperature_warmup, 1e-6))

    @torch.no_grad()
    def after_step(self, modules: nn.ModuleDict, step: Step) -> None:
        """Move the teacher towards the student."""
        momentum = 1 - (1 - self.objective.teacher_momentum) * (math.cos(math.pi * step.progress) + 1) / 2
        teacher: list[Tensor] = list(modules["teacher"].parameters())
        student: list[Tensor] = list(modules["student"].parameters())
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def _with_heads(encoder: TrainableEncoder, objective: DistillationObjective) -> Projection:
    heads = require("lightly.models.modules.heads", "train", "training an encoder")

    def head() -> nn.Module:
        widths = encoder.dim, objective.hidden, objective.bottleneck, objective.prototypes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # lightly's head uses torch's older weight_norm
            made: nn.Module = heads.DINOProjectionHead(*widths, batch_norm=objective.batch_norm)
        return made

    return Projection(encoder, head(), head() if objective.patch_weight else None)
