"""What makes an image like another: pixels, a perceptual distance, and a patch discriminator. The VQGAN and the
feed-forward decoder are trained with it.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, Share, config
from digit.encoders.loading import load_encoder
from digit.models.discriminator import Discriminator, DiscriminatorConfig
from digit.training.losses import adversarial
from digit.training.losses.adversarial import Augmentation
from digit.training.losses.perceptual import EncoderView, LpipsDistance, feature_distance
from digit.training.task import Batch, Groups, Loss, Step

_LECAM_SPEED = 0.01  # of the averages of logits
Metrics = Mapping[str, Tensor]


@config
class ImageObjective:
    """What a generated image is compared by. Pixels are in 0..1.

    Attributes:
        l1, l2: weights of the mean absolute and squared error of a pixel.
        perceptual: "none", "lpips" (fetches VGG16 once) or "encoder" (a frozen encoder of this library, whose features
            the discriminator then sees too).
        perceptual_encoder: that encoder: a folder or a hub id.
        perceptual_weight: of the perceptual distance.
        gan_weight: of the generator's adversarial loss; 0 trains without a discriminator.
        gan_start, gan_alone, gan_warmup: shares of the run: when the discriminator begins, how long it learns before
            the generator feels it, and over which its weight then grows.
        gan_adaptive: multiply that weight by the ratio of the other losses' gradient and its own, at the generator's
            last layer, but by this number at most; 0 leaves the weight alone.
        discriminator: its shape.
        discriminator_lr: its learning rate, as a factor of the run's.
        discriminator_betas: of its AdamW; None takes the run's.
        augment: how images are changed before the discriminator sees them; see
            :func:`~digit.training.losses.adversarial.augment`.
        discriminator_steps: how often it learns from each batch; it is cheap beside the generator, which otherwise
            outruns it.
        flip: chance of a horizontal flip.
        shift: image and reconstruction are moved by up to so many pixels, together, before they are compared. Networks
            that halve the side see a pattern of two or four pixels only where it falls between their steps, and a
            generator that is left to discriminators alone learns to hide in the steps.
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
    shift: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if (self.perceptual == "encoder") != (self.perceptual_encoder is not None):
            raise ValueError("perceptual_encoder names the encoder of perceptual 'encoder': give both or neither")

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Random numbers of ``count`` examples: "flip" (count,) bool, and "shift" (count, 2) where there is one."""
        drawn = {"flip": torch.rand(count, generator=generator) < self.flip}
        if self.shift:
            drawn["shift"] = torch.randint(2 * self.shift + 1, (count, 2), generator=generator)
        return drawn

    def moved(self, images: Tensor, batch: Batch) -> Tensor:
        """Images (B, 3, S, S) moved by the batch's first draw; what comes into view at a side is mirrored."""
        if not self.shift:
            return images
        # by index, not by slices, whose bounds the device would have to tell
        rows, columns = batch["shift"][0][:, None] + torch.arange(images.shape[-1], device=images.device)  # (S,) each
        return F.pad(images, (self.shift,) * 4, mode="reflect").index_select(-2, rows).index_select(-1, columns)


class ImageLoss:
    """The frozen networks of an objective, which only compare, and its losses. A ``discriminator`` is to be trained
    beside the generator, as an entry of the task's ``modules``.
    """

    def __init__(self, objective: ImageObjective, resolution: int, last: Tensor | None = None) -> None:
        """Load what compares images of ``resolution`` pixels. ``last`` is the weight of the generator's last layer,
        where ``gan_adaptive`` compares gradients; without it they are compared at the images.

        Raises:
            DigitError: the perceptual network is missing or does not fit.
        """
        self.objective, self.last = objective, last
        self.lpips = LpipsDistance() if objective.perceptual == "lpips" else None
        eyes = objective.perceptual_encoder
        self.view = None if eyes is None else EncoderView(load_encoder(eyes), resolution)
        self.frozen = [network for network in (self.lpips, self.view) if network is not None]
        self.discriminator: Discriminator | None = None
        if objective.gan_weight:
            seen = self.view.dims if self.view and objective.discriminator.feature_channels else ()
            self.discriminator = Discriminator(objective.discriminator, seen)

    def optimizers(self) -> Groups:
        """The discriminator's parameter group, if there is one."""
        if self.discriminator is None:
            return {}
        group = {"params": list(self.discriminator.parameters()), "lr_scale": self.objective.discriminator_lr}
        betas = self.objective.discriminator_betas
        return {"discriminator": [group if betas is None else {**group, "betas": betas}]}

    def __call__(
        self,
        loss: Tensor | float,
        metrics: Metrics,
        rebuilt: Tensor,
        images: Tensor,
        batch: Batch,
        step: Step,
        modules: nn.ModuleDict,
        matched: int | None = None,
        unmatched_pixels: float = 1.0,
    ) -> Iterator[Loss]:
        """The losses of a step: the generator's, then the discriminator's once it has begun, as often as it learns.

        Args:
            loss, metrics: what the generator pays otherwise.
            rebuilt: (B', 3, S, S), B' >= B; what is beyond the first B ``images`` has no image to be like.
            modules: the task's, whose "discriminator" the loop may have wrapped.
            matched: how many of the images must come back in every way. The others pay the deeper half of the
                perceptual features (shallow layers see colours) and ``unmatched_pixels`` of the pixels' loss.
        """
        images, rebuilt = (self.objective.moved(some, batch) for some in (images, rebuilt))
        with torch.no_grad():
            wanted = self._see(images)
        seen = self._see(rebuilt)
        count, half = len(images), len(seen) // 2
        matched = count if matched is None else matched
        value, more = self._compare(rebuilt, images, seen, wanted, slice(matched))
        if matched < count:
            rest = slice(matched, count)
            other, _ = self._compare(rebuilt, images, seen[half:], wanted[half:], rest, unmatched_pixels)
            value = matched / count * value + (1 - matched / count) * other
        loss, metrics = loss + value, {**metrics, **more}
        if self.discriminator is None or step.progress < self.objective.gan_start:
            yield Loss("model", loss, metrics)
        else:
            yield from self._adversarial(loss, metrics, modules["discriminator"], rebuilt, images, seen, wanted, step)

    def _see(self, images: Tensor) -> list[Tensor]:
        """The layers of features (B, C, h, w) of images (B, 3, S, S); none without a perceptual encoder."""
        return self.view(images) if self.view else []

    def _compare(
        self,
        rebuilt: Tensor,
        images: Tensor,
        seen: Sequence[Tensor],
        wanted: Sequence[Tensor],
        rows: slice,
        pixels: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some rows, the pixels' part of it times ``pixels``, and metrics."""
        objective, rebuilt, images = self.objective, rebuilt[rows], images[rows]
        l1, l2 = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images)
        value = pixels * (objective.l1 * l1 + objective.l2 * l2)
        metrics = {"l1": l1.detach(), "psnr": -10 * l2.detach().log10()}
        if objective.perceptual == "none":
            return value, metrics
        if self.lpips is None:
            distance = feature_distance([s[rows] for s in seen], [w[rows] for w in wanted])
        else:
            distance = self.lpips(rebuilt, images)
        return value + objective.perceptual_weight * distance, {**metrics, "perceptual": distance.detach()}

    def _adversarial(
        self,
        loss: Tensor,
        metrics: Metrics,
        discriminator: nn.Module,
        rebuilt: Tensor,
        images: Tensor,
        seen: Sequence[Tensor],
        wanted: Sequence[Tensor],
        step: Step,
    ) -> Iterator[Loss]:
        objective = self.objective
        g_loss = adversarial.generator_hinge(discriminator(*self._shown(rebuilt, seen)))
        metrics = {**metrics, "g_loss": g_loss.detach()}
        begin, last = objective.gan_start + objective.gan_alone, rebuilt if self.last is None else self.last
        weight: float | Tensor = objective.gan_weight * adversarial.ramp(step.progress, begin, objective.gan_warmup)
        if objective.gan_adaptive and weight:
            ratio = adversarial.gradient_ratio(loss, g_loss, last, objective.gan_adaptive)
            weight, metrics = weight * ratio, {**metrics, "gan_ratio": ratio}
        yield Loss("model", loss + weight * g_loss, metrics)
        for _ in range(objective.discriminator_steps):
            with torch.no_grad():
                real, fake = self._shown(images, wanted), self._shown(rebuilt.detach(), seen)
                both = torch.cat([real[0], fake[0]])  # (B + B', 3, S, S)
                layers = [torch.cat([w, s]).detach() for w, s in zip(real[1], fake[1], strict=True)]
            yield self._discrimination(discriminator(both, layers), len(images))

    def _shown(self, images: Tensor, seen: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Images and their features as the discriminator gets them."""
        features = self.objective.discriminator.feature_channels
        if self.objective.augment:
            images = adversarial.augment(images, self.objective.augment)
            seen = self._see(images) if features else ()
        return images, seen if features else ()

    def _discrimination(self, logits: Sequence[Tensor], real: int) -> Loss:
        """The discriminator's own loss from maps of logits, of which the first ``real`` rows are of images."""
        assert self.discriminator is not None
        true, false = zip(*((one[:real].float(), one[real:].float()) for one in logits), strict=True)
        loss = hinge = adversarial.discriminator_hinge(true, false)
        means = [-adversarial.generator_hinge(some).detach() for some in (true, false)]
        metrics = {"hinge": hinge.detach(), "logits_real": means[0], "logits_fake": means[1]}
        weight = self.objective.discriminator.lecam
        if weight:
            averages = self.discriminator.averages
            penalty = adversarial.lecam(true, false, averages.clone())
            now = [torch.stack([r.detach().mean(), f.detach().mean()]) for r, f in zip(true, false, strict=True)]
            averages.lerp_(torch.stack(now), _LECAM_SPEED)
            loss, metrics = hinge + weight * penalty, {**metrics, "lecam": penalty.detach()}
        return Loss("discriminator", loss, metrics)
