"""What makes an image like another: pixels, a perceptual distance, and a patch discriminator. The VQGAN and the
feed-forward decoder are trained with it.

Sources: [0] Esser et al. 2021, arXiv 2012.09841, section 3.1 (the sum, the adaptive weight). [1] Zhang et al. 2018,
arXiv 1801.03924 (LPIPS). [2] Lim and Ye 2017, arXiv 1705.02894 (hinge). [3] Tseng et al. 2021, arXiv 2104.03310
(LeCAM). [4] Zhao et al. 2020, arXiv 2006.10738 (DiffAugment).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Probability, Share, config
from digit.core.errors import DigitError
from digit.encoders.loading import load_encoder
from digit.models.discriminator import Discriminator, DiscriminatorConfig
from digit.models.lpips import load_lpips
from digit.training.losses.energy import Seen, energy
from digit.training.losses.perceptual import EncoderView, feature_distance, lpips_layers
from digit.training.task import Batch, Groups, Loss, Step

_LECAM_SPEED = 0.01  # of the averages of logits
Metrics = Mapping[str, Tensor]
Augmentation = Literal["color", "translation", "cutout"]
"""One of DiffAugment's [4]."""


@config
class ImageObjective:
    """What a generated image is compared by; ``presets/bases/pixels.yaml`` explains the fields, and these beside them.

    Attributes:
        gan_alone: share of the run in which the discriminator learns before the generator feels it.
        gan_adaptive: multiply its weight by the ratio of the other losses' gradient and its own, at the generator's
            last layer, but by this number at most; 0 leaves the weight alone.
        discriminator_betas: of its AdamW; None takes the run's.
        augment: how images are changed before the discriminator sees them; see :func:`augment`.
        shift: networks that halve the side see a pattern of two or four pixels only where it falls between their steps,
            and a generator that is left to discriminators alone learns to hide in the steps.
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
        if self.perceptual == "encoder" and self.perceptual_encoder is None:
            raise ValueError("perceptual 'encoder' compares what an encoder sees: name it as perceptual_encoder")
        if self.perceptual == "none" and self.perceptual_encoder is not None:
            raise ValueError("perceptual_encoder is given and perceptual 'none' compares nothing it sees: leave it out")

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
    """The losses of an objective, the frozen networks that only compare, and a ``discriminator`` that is to be
    trained.
    """

    def __init__(
        self, objective: ImageObjective, resolution: int, last: Tensor | None = None, energy_weight: float = 0.0
    ) -> None:
        """Load what compares images of ``resolution`` pixels; a DigitError where it is missing or does not fit.

        Args:
            last: where gradients are compared, the weight of the generator's last layer; None: at the images.
            energy_weight: above 0, this much of the energy distance of two draws takes the place of the other
                comparisons.
        """
        self.objective, self.last, self.energy_weight = objective, last, energy_weight
        self.lpips: Any = None
        if objective.perceptual == "lpips":
            try:
                self.lpips = load_lpips("vgg").network
            except DigitError as error:
                raise DigitError(f"{error} Or set objective.perceptual to 'encoder' or 'none'.") from error
        eyes = objective.perceptual_encoder
        self.view = None if eyes is None else EncoderView(load_encoder(eyes), resolution)
        self.frozen = [network for network in (self.lpips, self.view) if network is not None]
        self.discriminator: Discriminator | None = None
        if objective.gan_weight:
            widths = self.view.dims if self.view else []
            if energy_weight and self.lpips is not None:
                widths = [*widths, *self.lpips.chns]
            self.discriminator = Discriminator(
                objective.discriminator, widths if objective.discriminator.feature_channels else ()
            )

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
            rebuilt: (B', 3, S, S), B' >= B; what is beyond the first B ``images`` has no image to be like. With an
                energy distance it begins with two draws of each image, all first before all second ones.
            modules: the task's, whose "discriminator" the loop may have wrapped.
            matched: how many of the images must come back in every way. The others pay the deeper half of the
                perceptual features (shallow layers see colours) and ``unmatched_pixels`` of the pixels' loss.
        """
        images, rebuilt = (self.objective.moved(some, batch) for some in (images, rebuilt))
        with torch.no_grad():
            wanted = self._see(images)
        seen = self._see(rebuilt)
        if self.energy_weight:
            value, more = self._energy(rebuilt, images, seen, wanted)
            value = self.energy_weight * value
        else:
            value, more = self._comparison(rebuilt, images, seen, wanted, matched, unmatched_pixels)
        loss, metrics = loss + value, {**metrics, **more}
        if self.discriminator is None or step.progress < self.objective.gan_start:
            yield Loss("model", loss, metrics)
        else:
            yield from self._adversarial(loss, metrics, modules["discriminator"], rebuilt, images, seen, wanted, step)

    def _see(self, images: Tensor) -> list[Tensor]:
        """The layers of features (B, C, h, w) that a discriminator gets too: of the encoder, and with an energy
        distance of LPIPS's backbone; without one LPIPS compares by itself.
        """
        layers = self.view(images) if self.view else []
        if self.energy_weight and self.lpips is not None:
            layers = [*layers, *lpips_layers(self.lpips, images)]
        return layers

    def _energy(
        self, rebuilt: Tensor, images: Tensor, seen: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The energy distance of the two draws of each image, in all layers, and metrics; "variety" should come to
        1.
        """
        count = len(images)
        first, second = (
            Seen(rebuilt[rows], [layer[rows] for layer in seen]) for rows in (slice(count), slice(count, 2 * count))
        )
        value, variety = energy(first, second, Seen(images, wanted))
        return value, {**_pixels(rebuilt[:count], images)[2], "variety": variety}

    def _comparison(
        self,
        rebuilt: Tensor,
        images: Tensor,
        seen: Sequence[Tensor],
        wanted: Sequence[Tensor],
        matched: int | None,
        unmatched_pixels: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the rows that have an image, those that must come back in every way and the others."""
        count, half = len(images), len(seen) // 2
        matched = count if matched is None else matched
        value, more = self._compare(rebuilt, images, seen, wanted, slice(matched))
        if matched < count:
            rest = slice(matched, count)
            other, _ = self._compare(rebuilt, images, seen[half:], wanted[half:], rest, unmatched_pixels)
            value = matched / count * value + (1 - matched / count) * other
        return value, more

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
        l1, l2, metrics = _pixels(rebuilt, images)
        value = pixels * (objective.l1 * l1 + objective.l2 * l2)
        if objective.perceptual == "none":
            return value, metrics
        if self.lpips is None:
            distance = feature_distance([s[rows] for s in seen], [w[rows] for w in wanted])
        else:
            distance = self.lpips(rebuilt * 2 - 1, images * 2 - 1).float().mean()
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
        g_loss = generator_hinge(discriminator(*self._shown(rebuilt, seen)))
        metrics = {**metrics, "g_loss": g_loss.detach()}
        begin, last = objective.gan_start + objective.gan_alone, rebuilt if self.last is None else self.last
        weight: float | Tensor = objective.gan_weight * ramp(step.progress, begin, objective.gan_warmup)
        if objective.gan_adaptive and weight:
            ratio = gradient_ratio(loss, g_loss, last, objective.gan_adaptive)
            weight, metrics = weight * ratio, {**metrics, "gan_ratio": ratio}
        yield Loss("model", loss + weight * g_loss, metrics)
        both = torch.cat([images, rebuilt.detach()])  # (B + B', 3, S, S)
        layers = [torch.cat([w, s.detach()]) for w, s in zip(wanted, seen, strict=True)]
        for _ in range(objective.discriminator_steps):
            with torch.no_grad():
                shown = self._shown(both, layers)
            yield self._discrimination(discriminator(*shown), len(images))

    def _shown(self, images: Tensor, seen: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Images and their features as the discriminator gets them."""
        wants = self.objective.discriminator.feature_channels
        if self.objective.augment:
            images = augment(images, self.objective.augment)
            seen = self._see(images) if wants else ()
        return images, seen if wants else ()

    def _discrimination(self, logits: Sequence[Tensor], real: int) -> Loss:
        """The discriminator's own loss from maps of logits, of which the first ``real`` rows are of images."""
        assert self.discriminator is not None
        true, false = zip(*((one[:real].float(), one[real:].float()) for one in logits), strict=True)
        loss = hinge = discriminator_hinge(true, false)
        means = [-generator_hinge(some).detach() for some in (true, false)]
        metrics = {"hinge": hinge.detach(), "logits_real": means[0], "logits_fake": means[1]}
        weight = self.objective.discriminator.lecam
        if weight:
            averages = self.discriminator.averages
            penalty = lecam(true, false, averages.clone())
            now = [torch.stack([r.detach().mean(), f.detach().mean()]) for r, f in zip(true, false, strict=True)]
            averages.lerp_(torch.stack(now), _LECAM_SPEED)
            loss, metrics = hinge + weight * penalty, {**metrics, "lecam": penalty.detach()}
        return Loss("discriminator", loss, metrics)


def _pixels(rebuilt: Tensor, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """() mean absolute and () mean squared error, and metrics of them."""
    l1, l2 = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images)
    return l1, l2, {"l1": l1.detach(), "psnr": -10 * l2.detach().log10()}


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """() real logits should be above 1, fake ones below -1; 1 is chance. Every map counts alike, whatever its size."""
    terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).mean() / 2


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """() from maps of logits: fakes should get high ones. Every map counts alike."""
    return -torch.stack([f.mean() for f in fake]).mean()


def lecam(real: Sequence[Tensor], fake: Sequence[Tensor], averages: Tensor) -> Tensor:
    """() how far logits stand on the wrong side of ``averages`` (maps, 2), the real and fake ones of before, squared
    [3].
    """
    terms = [
        F.relu(r - mean_fake).square().mean() + F.relu(mean_real - f).square().mean()
        for r, f, (mean_real, mean_fake) in zip(real, fake, averages, strict=True)
    ]
    return torch.stack(terms).mean()


def gradient_ratio(loss: Tensor, adversarial: Tensor, at: Tensor, limit: float) -> Tensor:
    """() norm of the gradient of ``loss`` at ``at``, in units of that of ``adversarial``; at most ``limit`` [0]."""
    ours, theirs = (torch.autograd.grad(value, at, retain_graph=True)[0].norm() for value in (loss, adversarial))
    ratio: Tensor = (ours / (theirs + 1e-6)).clamp(max=limit).detach()
    return ratio


def ramp(progress: float, start: float, warmup: float) -> float:
    """0 before ``start``, then linearly to 1 over ``warmup``; all three are shares of the run."""
    if progress < start:
        return 0.0
    return min(1.0, (progress - start) / warmup) if warmup else 1.0


def augment(images: Tensor, kinds: Sequence[Augmentation]) -> Tensor:
    """Images (B, 3, S, S) in 0..1, each changed at random (torch's global generator), so that gradients pass [4]."""
    for kind in kinds:
        images = _AUGMENTATIONS[kind](images)
    return images


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) * (high - low) + low  # (B, 1, 1, 1)


def _color(images: Tensor) -> Tensor:
    """Brightness, saturation and contrast. Values outside 0..1 are left."""
    images = images + _uniform(images, -0.25, 0.25)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * _uniform(images, 0, 2)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5)


def _translation(images: Tensor) -> Tensor:
    """Moved by up to an eighth of the side; what comes into view is gray."""
    count, _, side, _ = images.shape
    most = side // 8
    padded = F.pad(images, (most,) * 4, value=0.5)  # (B, 3, S + 2 m, S + 2 m)
    moves = torch.randint(2 * most + 1, (2, count, 1), device=images.device)
    rows, columns = moves + torch.arange(side, device=images.device)  # (B, S) each
    example = torch.arange(count, device=images.device)[:, None, None]
    return padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _cutout(images: Tensor) -> Tensor:
    """A square of half the side is gray, wherever its centre falls."""
    side = images.shape[-1]
    places = torch.arange(side, device=images.device)
    centres = torch.randint(side, (2, len(images), 1), device=images.device)
    rows, columns = (places - centres).abs() < side // 4  # (B, S) each
    hidden = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, S, S)
    return images.masked_fill(hidden, 0.5)


_AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
