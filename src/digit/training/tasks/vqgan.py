"""Training a VQGAN: pixels, a perceptual distance, a patch discriminator, and a codebook that follows the latents.

A VQGAN preset has the sections ``model`` (:class:`~digit.models.vqgan.VQGANConfig`), ``objective``
(:class:`VqganObjective`), ``data`` (:class:`VqganData`) and ``training``.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1. Unlike there, the codebook moves by averages; see also
:mod:`digit.training.losses.images`.
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

from digit.core.config import config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.grids import picture_grid
from digit.core.images import to_pil
from digit.data.dataset import ImageDataset
from digit.models.component import weights_checksum
from digit.models.transformer import Probability
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.training.config import NonNegative, NonNegativeInt
from digit.training.finetune import FineTune, start_folder, take_modules
from digit.training.losses.images import PictureLoss, PictureObjective
from digit.training.losses.quantizer import EmaQuantizer
from digit.training.task import Batch, Loss, Step, Stream
from digit.training.tasks.images import errors, image_batches, image_chunks, mirrored, open_images, some_images

_PICTURES = 8


@config
class VqganObjective(PictureObjective):
    """What a VQGAN is trained for: pictures like those that went in (:class:`PictureObjective`), and codes that are all
    used.

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
        start: FineTune | None = None,
    ) -> None:
        """Set up.

        Args:
            model: the VQGAN to make.
            objective: what it is trained for.
            train: what on.
            held_out: what its reconstructions are measured on; None measures nothing.
            start: the saved VQGAN to begin with, with the discriminator of its run where there is one. Where it freezes
                "tokens", encoder and codebook stay, so tokens and all that was trained on them keep their meaning.

        Raises:
            DigitError: the perceptual network is missing or does not fit, or the saved VQGAN is of another shape.
        """
        self.vqgan, self.objective = VQGAN(model), objective
        origin = {} if start is None else {"start": self._start(start)}
        self.vqgan.codebook.requires_grad_(False)
        # the loop may wrap what is trained, so the parts are named one by one; the VQGAN holds the same parts
        self.modules = nn.ModuleDict({"decoder": self.vqgan.decoder})
        self.quantizer: EmaQuantizer | None = None
        if start is None or not start.freeze:
            codebook = self.vqgan.codebook
            self.quantizer = EmaQuantizer(
                codebook, objective.codebook_decay, objective.dead_below, objective.gradient, model.normalize_codes
            )
            if start is not None:
                self.quantizer.go_on()
            self.modules.update({"encoder": self.vqgan.encoder, "quantizer": self.quantizer})
        self.pictures = PictureLoss(objective, model.resolution, self.vqgan.decoder.conv_out.weight)
        if self.pictures.discriminator is not None:
            self.modules["discriminator"] = self.pictures.discriminator
        if start is not None:
            take_modules(self.modules, start.source, ("discriminator",))
        self.train, self.examples = train, len(train)
        self.held_out = held_out
        self.device = "cpu"
        self.description: Mapping[str, Any] = {
            "component": "vqgan",
            "model": to_dict(model),
            "objective": to_dict(objective),
            "data": {"name": train.name, "split": train.split, "fingerprint": train.fingerprint},
            **origin,
        }

    def _start(self, start: FineTune) -> dict[str, Any]:
        """Begin with saved weights; what to note about them."""
        if start.lora or set(start.freeze) - {"tokens"}:
            raise DigitError(
                "A VQGAN can be trained on as a whole, or with --freeze tokens (encoder and codebook); no other part."
            )
        folder, _ = start_folder(start.source, "vqgan")
        saved = VQGAN.from_pretrained(folder)
        if saved.config != self.vqgan.config:
            raise DigitError(f"The VQGAN {start.source} is of another shape than the preset's model section describes.")
        self.vqgan.load_state_dict(saved.state_dict())
        return {"weights": weights_checksum(saved), "freeze": list(start.freeze)}

    # -- the protocol
    # --------------------------------------------------------------------------------------------------------

    def parameters_by_optimizer(self) -> dict[str, list[dict[str, Any]]]:
        """Encoder and decoder, and the discriminator apart. The codebook has no optimizer."""
        parameters = [
            p for name in ("encoder", "decoder") if name in self.modules for p in self.modules[name].parameters()
        ]
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
        codes, commitment, metrics = self._codes(images)
        rebuilt = self.modules["decoder"](codes).float()  # (B, 3, S, S)
        images, rebuilt = (self.objective.moved(some, batch) for some in (images, rebuilt))
        pictures = self.pictures
        with torch.no_grad():
            wanted = pictures.see(images)
        seen = pictures.see(rebuilt)
        pixels, of_pixels = pictures.pixels(rebuilt, images)
        distance, of_features = pictures.perceptual(rebuilt, images, seen, wanted)
        loss, metrics = pixels + distance + commitment, {**of_pixels, **of_features, **metrics}
        judge = self.modules["discriminator"] if pictures.judges(step) else None
        yield from pictures.losses(loss, metrics, judge, rebuilt, images, seen, wanted, step)

    def _codes(self, images: Tensor) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Codes (B, D, h, w) of images, what the encoder pays for its distance from them, and metrics."""
        if self.quantizer is None:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # the very tokens that others use
                codes = F.embedding(self.vqgan.encode(images), self.vqgan.codebook)  # (B, M, D)
            rows, columns = self.vqgan.config.grid
            return codes.transpose(1, 2).reshape(len(codes), -1, rows, columns), 0.0, {}  # (B, D, h, w)
        codes, _, commitment = self.modules["quantizer"](self.modules["encoder"](images))
        metrics = {"commitment": commitment.detach(), **self.quantizer.statistics()}
        return codes, self.objective.commitment * commitment, metrics

    def after_step(self, step: Step) -> None:  # noqa: ARG002
        """Move the codebook."""
        if self.quantizer is not None:
            self.quantizer.update()

    def validate(self) -> dict[str, float]:
        """PSNR in dB (mean over images) and mean absolute error of held-out reconstructions, and how they use the
        codes.
        """
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
        return picture_grid(
            [to_pil(image.cpu()) for row in ordered for image in row], columns=min(_PICTURES, len(images))
        )

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the VQGAN."""
        self.vqgan.provenance = dict(provenance)
        self.vqgan.save_pretrained(folder)

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vqgan.encode(images)
        return tokens, self.vqgan.decode(tokens).float().clamp(0, 1)


def build(preset: Mapping[str, Any], data: str | Path, where: str, start: FineTune | None = None) -> VqganTask:
    """The task of a VQGAN preset over a dataset, with random weights from torch's global generator or those of a saved
    VQGAN.

    Raises:
        DigitError: a section is wrong, the dataset cannot be opened, the perceptual network is missing, or ``start``
            does not fit.
    """
    model: VQGANConfig = from_dict(VQGANConfig, preset["model"], f"{where}, model")
    objective: VqganObjective = from_dict(VqganObjective, preset.get("objective") or {}, f"{where}, objective")
    choice = from_dict(VqganData, preset.get("data") or {}, f"{where}, data")
    train, held_out = open_images(data, choice.split, choice.held_out_split, choice.held_out)
    return VqganTask(model, objective, train, held_out, start)
