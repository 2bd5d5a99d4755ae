"""Training a VQGAN: pixels, a perceptual distance, a patch discriminator, and a codebook that follows the latents.

A VQGAN preset has the sections ``model`` (:class:`~digit.tokenizers.vqgan.VQGANConfig`), ``objective``
(:class:`VqganObjective`), ``data`` (:class:`VqganData`) and ``training``.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1. Unlike there, the codebook moves by averages, and the discriminator's
weight is a fixed number that is ramped up, not a ratio of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from digit.config import config, from_dict, to_dict
from digit.data.dataset import ImageDataset
from digit.data.images import to_pil
from digit.models.discriminator import Discriminator, DiscriminatorConfig
from digit.models.transformer import Probability
from digit.tokenizers.vqgan import VQGAN, VQGANConfig
from digit.training.config import NonNegative, NonNegativeInt, Positive
from digit.training.losses.adversarial import discriminator_hinge, generator_hinge, ramp
from digit.training.losses.perceptual import EncoderView, LpipsDistance, feature_distance
from digit.training.losses.quantizer import EmaQuantizer
from digit.training.task import Batch, Loss, Step, Stream
from digit.training.tasks.images import image_batches, image_chunks, open_images, some_images
from digit.training.views import Share
from digit.visual import picture_grid

_PICTURES = 8


@config
class VqganObjective:
    """What a VQGAN is trained for. Pixels are in 0..1.

    Attributes:
        l1, l2: weights of the mean absolute and squared error of a pixel.
        perceptual: "none", "lpips" (fetches VGG16 once) or "encoder" (a frozen encoder of this library, whose features the
            discriminator then judges too).
        perceptual_encoder: that encoder: a folder or a hub id.
        perceptual_weight: of the perceptual distance.
        commitment: weight of the latents' squared distance from their codes.
        codebook_decay: of the moving averages that are the codebook.
        dead_below: a code used less than this share of the mean is moved to a recent latent.
        gradient: how it passes the rounding: "straight-through" or "rotation"; see
            :class:`~digit.training.losses.quantizer.EmaQuantizer`.
        gan_weight: of the discriminator's judgement; 0 trains without one.
        gan_start, gan_warmup: shares of the run after which the discriminator begins and over which its weight grows.
        discriminator: its shape.
        discriminator_lr: its learning rate, as a factor of the run's.
        flip: chance of mirroring a picture left to right.
    """

    l1: NonNegative = 1.0
    l2: NonNegative = 0.0
    perceptual: Literal["none", "lpips", "encoder"] = "none"
    perceptual_encoder: str | None = None
    perceptual_weight: NonNegative = 1.0
    commitment: NonNegative = 0.25
    codebook_decay: Probability = 0.99
    dead_below: Annotated[float, Field(ge=0, lt=1)] = 0.03
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    gan_weight: NonNegative = 0.0
    gan_start: Share = 0.3
    gan_warmup: Share = 0.1
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    discriminator_lr: Positive = 1.0
    flip: Share = 0.5

    def __post_init__(self) -> None:
        if (self.perceptual == "encoder") != (self.perceptual_encoder is not None):
            raise ValueError("perceptual_encoder names the encoder of perceptual 'encoder': give both or neither")


@config
class VqganData:
    """Which images are learned from, and which measure the reconstructions.

    Attributes:
        split: of the training images.
        held_out_split: of the images that measure; None keeps some of the training images back.
        held_out: how many of them; 0 takes all.
    """

    split: str = "train"
    held_out_split: str | None = "test"
    held_out: NonNegativeInt = 2000


class VqganTask:
    """A VQGAN in training; see :class:`digit.training.task.Task`."""

    def __init__(
        self,
        model: VQGANConfig,
        objective: VqganObjective,
        train: ImageDataset,
        held_out: ImageDataset | None = None,
    ) -> None:
        """Set up.

        Args:
            model: the VQGAN to make.
            objective: what it is trained for.
            train: what on.
            held_out: what its reconstructions are measured on; None measures nothing.

        Raises:
            DigitError: the perceptual network is missing or does not fit.
        """
        self.vqgan, self.objective = VQGAN(model), objective
        self.vqgan.codebook.requires_grad_(False)
        quantizer = EmaQuantizer(self.vqgan.codebook, objective.codebook_decay, objective.dead_below, objective.gradient)
        # the loop may wrap what is trained, so the parts are named one by one; the VQGAN holds the same parts
        self.modules = nn.ModuleDict({"encoder": self.vqgan.encoder, "decoder": self.vqgan.decoder, "quantizer": quantizer})
        self.quantizer = quantizer
        self.lpips = LpipsDistance() if objective.perceptual == "lpips" else None
        self.view: EncoderView | None = None
        if objective.perceptual_encoder is not None:
            self.view = EncoderView.from_pretrained(objective.perceptual_encoder, model.resolution)
        if objective.gan_weight:
            self.modules["discriminator"] = Discriminator(objective.discriminator, self.view.dims if self.view else ())
        self.train, self.examples = train, len(train)
        self.held_out = held_out
        self.device = "cpu"
        self.description: Mapping[str, Any] = {
            "component": "vqgan",
            "model": to_dict(model),
            "objective": to_dict(objective),
            "data": {"name": train.name, "split": train.split, "fingerprint": train.fingerprint},
        }

    # -- the protocol --------------------------------------------------------------------------------------------------------

    def parameters_by_optimizer(self) -> dict[str, list[dict[str, Any]]]:
        """Encoder and decoder, and the discriminator apart. The codebook has no optimizer."""
        parameters = [*self.modules["encoder"].parameters(), *self.modules["decoder"].parameters()]
        groups: dict[str, list[dict[str, Any]]] = {"model": [{"params": parameters}]}
        if "discriminator" in self.modules:
            judge = list(self.modules["discriminator"].parameters())
            groups["discriminator"] = [{"params": judge, "lr_scale": self.objective.discriminator_lr}]
        return groups

    def to_device(self, device: str) -> None:
        """Move the networks."""
        self.vqgan.to(device)
        self.modules.to(device)
        for frozen in (self.lpips, self.view):
            if frozen is not None:
                frozen.to(device)
        self.device = device

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Images as uint8, and which of them are mirrored."""

        def draw(count: int, generator: torch.Generator) -> Batch:
            return {"flip": torch.rand(count, generator=generator) < self.objective.flip}

        return image_batches(self.train, self.vqgan.config.resolution, stream, draw)

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The reconstruction's loss, then the discriminator's once it has begun."""
        images = batch["images"].float() / 255
        images = torch.where(batch["flip"][:, None, None, None], images.flip(3), images)
        codes, _, commitment = self.modules["quantizer"](self.modules["encoder"](images))
        rebuilt = self.modules["decoder"](codes).float()  # (B, 3, S, S)
        with torch.no_grad():
            wanted = self.view(images) if self.view else []
        seen = self.view(rebuilt) if self.view else []
        loss, metrics = self._reconstruction(rebuilt, images, seen, wanted)
        loss = loss + self.objective.commitment * commitment
        metrics |= {"commitment": commitment.detach(), **self.quantizer.statistics()}
        start, weight = self.objective.gan_start, self.objective.gan_weight
        judged = weight > 0 and step.progress >= start
        if judged:
            judgement = generator_hinge(self.modules["discriminator"](rebuilt, seen))
            loss = loss + weight * ramp(step.progress, start, self.objective.gan_warmup) * judgement
            metrics["judgement"] = judgement.detach()
        yield Loss("model", loss, metrics)
        if judged:
            both = [torch.cat([w, s.detach()]) for w, s in zip(wanted, seen, strict=True)]
            logits = self.modules["discriminator"](torch.cat([images, rebuilt.detach()]), both)
            real, fake = zip(*(one.float().chunk(2) for one in logits), strict=True)
            metrics = {"real": -generator_hinge(real).detach(), "fake": -generator_hinge(fake).detach()}
            yield Loss("discriminator", discriminator_hinge(real, fake), metrics)

    def after_step(self, step: Step) -> None:  # noqa: ARG002
        """Move the codebook."""
        self.quantizer.update()

    def validate(self) -> dict[str, float]:
        """PSNR in dB (mean over images) and mean absolute error of held-out reconstructions, and how they use the codes."""
        if self.held_out is None:
            return {}
        psnr, error, uses = 0.0, 0.0, torch.zeros(self.vqgan.config.codes)
        for images in image_chunks(self.held_out, self.vqgan.config.resolution, self.device):
            tokens, rebuilt = self._reconstruct(images)
            squared = (rebuilt - images).square().flatten(1).mean(1)  # (b,)
            psnr += float(-10 * squared.clamp(min=1e-10).log10().sum())
            error += float((rebuilt - images).abs().flatten(1).mean(1).sum())
            uses += torch.bincount(tokens.flatten().cpu(), minlength=len(uses))
        share = uses / uses.sum()
        return {
            "psnr": psnr / len(self.held_out),
            "l1": error / len(self.held_out),
            "codebook_use": float((uses > 0).float().mean()),
            "perplexity": math.exp(-float((share * (share + 1e-10).log()).sum())),
        }

    def sample(self, step: Step) -> Image.Image | None:  # noqa: ARG002
        """Eight images above their reconstructions, twice."""
        source = some_images(self.held_out or self.train, 2 * _PICTURES)
        images = next(image_chunks(source, self.vqgan.config.resolution, self.device))
        _, rebuilt = self._reconstruct(images)
        rows = [*torch.split(images, _PICTURES), *torch.split(rebuilt, _PICTURES)]
        ordered = [row for pair in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True) for row in pair]
        return picture_grid([to_pil(image.cpu()) for row in ordered for image in row], columns=min(_PICTURES, len(images)))

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the VQGAN."""
        self.vqgan.provenance = dict(provenance)  # type: ignore[assignment]
        self.vqgan.save_pretrained(folder)

    # -- parts of the loss -----------------------------------------------------------------------------------------------------

    def _reconstruction(
        self, rebuilt: Tensor, images: Tensor, seen: list[Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        objective = self.objective
        l1, l2 = F.l1_loss(rebuilt, images), F.mse_loss(rebuilt, images)
        loss = objective.l1 * l1 + objective.l2 * l2
        metrics = {"l1": l1.detach(), "psnr": -10 * l2.detach().log10()}
        if objective.perceptual != "none":
            distance = feature_distance(seen, wanted) if self.lpips is None else self.lpips(rebuilt, images)
            loss = loss + objective.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        return loss, metrics

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vqgan.encode(images)
        return tokens, self.vqgan.decode(tokens).float().clamp(0, 1)


def build(preset: Mapping[str, Any], data: str | Path, where: str) -> VqganTask:
    """The task of a VQGAN preset over a dataset, with random weights from torch's global generator.

    Raises:
        DigitError: a section is wrong, the dataset cannot be opened, or the perceptual network is missing.
    """
    model: VQGANConfig = from_dict(VQGANConfig, preset["model"], f"{where}, model")
    objective: VqganObjective = from_dict(VqganObjective, preset.get("objective") or {}, f"{where}, objective")
    choice = from_dict(VqganData, preset.get("data") or {}, f"{where}, data")
    train, held_out = open_images(data, choice.split, choice.held_out_split, choice.held_out)
    return VqganTask(model, objective, train, held_out)
