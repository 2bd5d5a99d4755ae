"""What makes a picture like another: pixels, a perceptual distance, and a patch discriminator. The VQGAN and the
one-pass decoder are trained with it.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import PositiveInt, Probability, config
from digit.models.discriminator import Discriminator, DiscriminatorConfig
from digit.training.config import NonNegative, Positive
from digit.training.losses.adversarial import (
    Augmentation,
    augment,
    discriminator_hinge,
    generator_hinge,
    gradient_ratio,
    lecam,
    ramp,
)
from digit.training.losses.perceptual import EncoderView, LpipsDistance, feature_distance
from digit.training.task import Batch, Loss, Step
from digit.training.views import Share

_LECAM_SPEED = 0.01  # of the averages of logits


@config
class PictureObjective:
    """What a picture is compared by. Pixels are in 0..1.

    Attributes:
        l1, l2: weights of the mean absolute and squared error of a pixel.
        perceptual: "none", "lpips" (fetches VGG16 once) or "encoder" (a frozen encoder of this library, whose features
            the discriminator then judges too).
        perceptual_encoder: that encoder: a folder or a hub id.
        perceptual_weight: of the perceptual distance.
        gan_weight: of the discriminator's judgement; 0 trains without one.
        gan_start, gan_alone, gan_warmup: shares of the run: when the discriminator begins, how long it learns before the
            generator feels it, and over which its weight then grows.
        gan_adaptive: multiply its weight by the ratio of the other losses' gradient and its own, at the generator's last
            layer, but by this number at most; 0 leaves the weight alone.
        discriminator: its shape.
        discriminator_lr: its learning rate, as a factor of the run's.
        discriminator_betas: of its AdamW; None takes the run's.
        augment: how images and pictures are changed before the discriminator sees them; see
            :func:`~digit.training.losses.adversarial.augment`.
        discriminator_steps: how often it learns from each batch; it is cheap beside the generator, which otherwise
            outruns it.
        flip: chance of mirroring a picture left to right.
        shift: image and picture are moved by up to so many pixels, together, before they are compared and judged.
            Networks that halve the side see a pattern of two or four pixels only where it falls between their steps,
            and a generator that is left to judges alone learns to hide in the steps (translation is one of
            DiffAugment's, Zhao et al. 2020, arXiv 2006.10738).
    """

    l1: NonNegative = 1.0
    l2: NonNegative = 0.0
    perceptual: Literal["none", "lpips", "encoder"] = "none"
    perceptual_encoder: str | None = None
    perceptual_weight: NonNegative = 1.0
    gan_weight: NonNegative = 0.0
    gan_start: Share = 0.3
    gan_alone: Share = 0.0
    gan_warmup: Share = 0.1
    gan_adaptive: NonNegative = 0.0
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    discriminator_lr: Positive = 1.0
    discriminator_betas: tuple[Probability, Probability] | None = None
    discriminator_steps: PositiveInt = 1
    augment: tuple[Augmentation, ...] = ()
    flip: Share = 0.5
    shift: Annotated[int, Field(ge=0)] = 0

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of ``count`` examples: "flip" (count,) bool and, where there is a shift, "shift" (count,
        2).
        """
        drawn = {"flip": torch.rand(count, generator=generator) < self.flip}
        if self.shift:
            drawn["shift"] = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
        return drawn

    def moved(self, pictures: Tensor, batch: Batch) -> Tensor:
        """Pictures (B, 3, S, S) moved by the batch's first draw; what comes into view at a side is mirrored."""
        if not self.shift:
            return pictures
        y, x = batch["shift"][0].tolist()
        side = pictures.shape[-1]
        return F.pad(pictures, (self.shift,) * 4, mode="reflect")[..., y : y + side, x : x + side]

    def __post_init__(self) -> None:
        if (self.perceptual == "encoder") != (self.perceptual_encoder is not None):
            raise ValueError("perceptual_encoder names the encoder of perceptual 'encoder': give both or neither")


class PictureLoss:
    """The frozen networks of an objective, and its losses.

    Attributes:
        discriminator: to be trained beside the generator, as an entry of the task's ``modules``; None without one.
    """

    def __init__(self, objective: PictureObjective, resolution: int, last: Tensor | None = None) -> None:
        """Load what compares pictures of ``resolution`` pixels. ``last`` is the weight of the generator's last layer, where
        ``gan_adaptive`` compares gradients; without it they are compared at the pictures.

        Raises:
            DigitError: the perceptual network is missing or does not fit.
        """
        self.objective, self.last = objective, last
        self.lpips = LpipsDistance() if objective.perceptual == "lpips" else None
        self.view: EncoderView | None = None
        if objective.perceptual_encoder is not None:
            self.view = EncoderView.from_pretrained(objective.perceptual_encoder, resolution)
        self.discriminator: Discriminator | None = None
        if objective.gan_weight:
            seen = self.view.dims if self.view and objective.discriminator.feature_channels else ()
            self.discriminator = Discriminator(objective.discriminator, seen)

    def to(self, device: str) -> None:
        """Move the frozen networks."""
        for frozen in (self.lpips, self.view):
            if frozen is not None:
                frozen.to(device)

    def optimizers(self) -> dict[str, list[dict[str, Any]]]:
        """The discriminator's parameter group, if there is one; see :class:`digit.training.task.Task`."""
        if self.discriminator is None:
            return {}
        group: dict[str, Any] = {
            "params": list(self.discriminator.parameters()),
            "lr_scale": self.objective.discriminator_lr,
        }
        if self.objective.discriminator_betas is not None:
            group["betas"] = self.objective.discriminator_betas
        return {"discriminator": [group]}

    def see(self, images: Tensor) -> list[Tensor]:
        """The layers of features (B, C, h, w) of images (B, 3, S, S); none without a perceptual encoder."""
        return self.view(images) if self.view else []

    def pixels(self, rebuilt: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted error of the pixels, and "l1" and "psnr"."""
        l1, l2 = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images)
        return self.objective.l1 * l1 + self.objective.l2 * l2, {"l1": l1.detach(), "psnr": -10 * l2.detach().log10()}

    def perceptual(
        self, rebuilt: Tensor, images: Tensor, seen: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The weighted perceptual distance, and "perceptual" itself; 0 and nothing where the objective has none."""
        if self.objective.perceptual == "none":
            return 0.0, {}
        distance = feature_distance(seen, wanted) if self.lpips is None else self.lpips(rebuilt, images)
        return self.objective.perceptual_weight * distance, {"perceptual": distance.detach()}

    def judges(self, step: Step) -> bool:
        """Whether the discriminator has begun."""
        return self.discriminator is not None and step.progress >= self.objective.gan_start

    def losses(
        self,
        loss: Tensor,
        metrics: Mapping[str, Tensor],
        judge: nn.Module | None,
        rebuilt: Tensor,
        images: Tensor,
        seen: Sequence[Tensor],
        wanted: Sequence[Tensor],
        step: Step,
    ) -> Iterator[Loss]:
        """The end of a step: the generator's loss, with what it pays for being found out, then the discriminator's, as
        often as it learns.

        Args:
            loss, metrics: what the generator pays otherwise.
            judge: the discriminator, as the loop may have wrapped it; None while it does not judge.
            rebuilt, seen: pictures (B', 3, S, S) and their features.
            images, wanted: images (B, 3, S, S) and theirs.
            step: where the run is.
        """
        if judge is None:
            yield Loss("model", loss, metrics)
            return
        objective = self.objective
        shown, layers = self._shown(rebuilt, seen)
        adversarial = generator_hinge(judge(shown, layers))
        metrics = {**metrics, "judgement": adversarial.detach()}
        weight: float | Tensor = ramp(step.progress, objective.gan_start + objective.gan_alone, objective.gan_warmup)
        weight = objective.gan_weight * weight
        if objective.gan_adaptive and weight:
            at = rebuilt if self.last is None else self.last
            ratio = gradient_ratio(loss, adversarial, at, objective.gan_adaptive)
            weight, metrics = weight * ratio, {**metrics, "gan_ratio": ratio}
        yield Loss("model", loss + weight * adversarial, metrics)
        for _ in range(objective.discriminator_steps):
            with torch.no_grad():
                true, false = self._shown(images, wanted), self._shown(rebuilt.detach(), seen)
                both = torch.cat([true[0], false[0]])  # (B + B', 3, S, S)
                layers = [torch.cat([w, s]).detach() for w, s in zip(true[1], false[1], strict=True)]
            yield self._discrimination(judge, both, layers, len(images))

    def _shown(self, images: Tensor, seen: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Images and their features as the discriminator gets them."""
        features = self.objective.discriminator.feature_channels
        if not self.objective.augment:
            return images, seen if features else ()
        images = augment(images, self.objective.augment)
        return images, self.see(images) if features else ()

    def _discrimination(self, judge: nn.Module, images: Tensor, layers: Sequence[Tensor], real: int) -> Loss:
        """The discriminator's own loss, on (B + B', 3, S, S), of which the first ``real`` are images, and their
        features.
        """
        assert self.discriminator is not None
        logits = judge(images, layers)
        count = [real, len(images) - real]
        true, false = zip(*(one.float().split(count) for one in logits), strict=True)
        hinge = discriminator_hinge(true, false)
        metrics = {
            "hinge": hinge.detach(),
            "real": -generator_hinge(true).detach(),
            "fake": -generator_hinge(false).detach(),
        }
        weight = self.objective.discriminator.lecam
        if not weight:
            return Loss("discriminator", hinge, metrics)
        averages = self.discriminator.averages
        penalty = lecam(true, false, averages.clone())
        means = [torch.stack([r.detach().mean(), f.detach().mean()]) for r, f in zip(true, false, strict=True)]
        averages.lerp_(torch.stack(means), _LECAM_SPEED)
        return Loss("discriminator", hinge + weight * penalty, {**metrics, "lecam": penalty.detach()})
