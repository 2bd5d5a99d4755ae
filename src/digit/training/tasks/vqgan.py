"""Training a VQGAN: pixels, a perceptual distance, a patch discriminator, and a codebook that follows the latents.

A VQGAN preset has the sections ``model`` (:class:`~digit.tokenizers.vqgan.VQGANConfig`), ``objective``
(:class:`VqganObjective`), ``data`` (:class:`VqganData`) and ``training``.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1. Unlike there, the codebook moves by averages; see also
:mod:`digit.training.losses.pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from digit.config import config, from_dict, to_dict
from digit.data.dataset import ImageDataset
from digit.data.images import to_pil
from digit.models.transformer import Probability
from digit.tokenizers.vqgan import VQGAN, VQGANConfig
from digit.training.config import NonNegative, NonNegativeInt
from digit.training.losses.pictures import PictureLoss, PictureObjective
from digit.training.losses.quantizer import EmaQuantizer
from digit.training.task import Batch, Loss, Step, Stream
from digit.training.tasks.images import errors, image_batches, image_chunks, mirrored, open_images, some_images
from digit.visual import picture_grid

_PICTURES = 8


@config
class VqganObjective(PictureObjective):
    """What a VQGAN is trained for: pictures like those that went in (:class:`PictureObjective`), and codes that are all used.

    Attributes:
        commitment: weight of the latents' squared distance from their codes.
        codebook_decay: of the moving averages that are the codebook.
        dead_below: a code used less than this share of the mean is moved to a recent latent.
        gradient: how it passes the rounding: "straight-through" or "rotation"; see
            :class:`~digit.training.losses.quantizer.EmaQuantizer`.
    """

    commitment: NonNegative = 0.25
    codebook_decay: Probability = 0.99
    dead_below: Annotated[float, Field(ge=0, lt=1)] = 0.03
    gradient: Literal["straight-through", "rotation"] = "straight-through"


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
        self.pictures = PictureLoss(objective, model.resolution)
        if self.pictures.discriminator is not None:
            self.modules["discriminator"] = self.pictures.discriminator
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
        return {"model": [{"params": parameters}], **self.pictures.optimizers()}

    def to_device(self, device: str) -> None:
        """Move the networks."""
        self.vqgan.to(device)
        self.modules.to(device)
        self.pictures.to(device)
        self.device = device

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Images as uint8, and how they are mirrored and moved."""
        return image_batches(self.train, self.vqgan.config.resolution, stream, self.objective.draw)

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The reconstruction's loss, then the discriminator's once it has begun."""
        images = mirrored(batch)
        codes, _, commitment = self.modules["quantizer"](self.modules["encoder"](images))
        rebuilt = self.modules["decoder"](codes).float()  # (B, 3, S, S)
        images, rebuilt = (self.objective.moved(some, batch) for some in (images, rebuilt))
        pictures = self.pictures
        with torch.no_grad():
            wanted = pictures.see(images)
        seen = pictures.see(rebuilt)
        loss, metrics = pictures.pixels(rebuilt, images)
        distance, more = pictures.perceptual(rebuilt, images, seen, wanted)
        loss = loss + distance + self.objective.commitment * commitment
        metrics |= {**more, "commitment": commitment.detach(), **self.quantizer.statistics()}
        judge = self.modules["discriminator"] if pictures.judges(step) else None
        yield from pictures.losses(loss, metrics, judge, rebuilt, images, seen, wanted, step)

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
            more_psnr, more_error = errors(rebuilt, images)
            psnr, error = psnr + more_psnr, error + more_error
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
