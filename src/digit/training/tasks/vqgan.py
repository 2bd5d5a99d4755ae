"""Training a VQGAN: pixels, a perceptual distance, a patch discriminator, and a codebook that follows the latents.

Source: Esser et al. 2021, arXiv 2012.09841, section 3.1. Unlike there, the codebook moves by averages.
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

from digit.core.config import NonNegative, Probability, config, from_dict, to_dict
from digit.data.dataset import ImageDataset
from digit.models.vqgan import VQGAN, VQGANConfig
from digit.training.finetune import FineTune, saved_part, take_modules
from digit.training.losses.images import ImageLoss, ImageObjective
from digit.training.losses.quantizer import EmaQuantizer
from digit.training.task import Batch, Loss, Step
from digit.training.tasks.images import ImageData, ImageTask, described, errors, flipped, image_chunks, sheet


@config
class VqganObjective(ImageObjective):
    """What a VQGAN is trained for: good images and codes that are all used, as ``presets/bases/vqgan.yaml``
    explains.
    """

    commitment: NonNegative = 0.25
    codebook_decay: Probability = 0.99
    dead_below: Annotated[float, Field(ge=0, lt=1)] = 0.03
    gradient: Literal["straight-through", "rotation"] = "straight-through"


class VqganTask(ImageTask):
    """A VQGAN in training."""

    objective: VqganObjective

    def __init__(
        self,
        model: VQGANConfig,
        objective: VqganObjective,
        train: ImageDataset,
        held_out: ImageDataset | None = None,
        start: FineTune | None = None,
    ) -> None:
        """Make the VQGAN ``model``, which learns from ``train`` and is measured on ``held_out`` (None: not at all).

        With ``start`` it begins as a saved VQGAN, with the discriminator of its run where there is one. Where that
        freezes "tokens", encoder and codebook stay, so tokens and all that was trained on them keep their meaning. A
        DigitError where the perceptual network is missing or does not fit, or the saved VQGAN is of another shape.
        """
        self.vqgan = vqgan = VQGAN(model)
        description = {"component": "vqgan", "model": to_dict(model), "data": described(train)}
        if start is not None:
            note = saved_part(start, "vqgan", VQGAN.from_pretrained, vqgan, lambda v: v.config == model, "tokens")
            description["start"] = {**note, "freeze": list(start.freeze)}
        vqgan.codebook.requires_grad_(False)
        # the loop may wrap what is trained, so the parts are named one by one; the VQGAN holds the same parts
        networks: dict[str, nn.Module] = {"decoder": vqgan.decoder}
        self.quantizer: EmaQuantizer | None = None
        if start is None or not start.freeze:
            how = (objective.codebook_decay, objective.dead_below, objective.gradient, model.normalize_codes)
            self.quantizer = EmaQuantizer(vqgan.codebook, *how)
            if start is not None:
                self.quantizer.go_on()
            networks |= {"encoder": vqgan.encoder, "quantizer": self.quantizer}
        criterion = ImageLoss(objective, model.resolution, vqgan.decoder.conv_out.weight)
        super().__init__(networks, criterion, model.resolution, train, held_out, description, [vqgan])
        if start is not None:
            take_modules(self.modules, start.source, ("discriminator",))

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The reconstruction's loss, then the discriminator's once it has begun."""
        images = flipped(batch)
        codes, commitment, metrics = self._codes(images)
        rebuilt = self.modules["decoder"](codes).float()  # (B, 3, S, S)
        return self.criterion(commitment, metrics, rebuilt, images, batch, step, self.modules)

    def _codes(self, images: Tensor) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Codes (B, D, h, w) of images, what the encoder pays for its distance from them, and metrics."""
        if self.quantizer is None:
            with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # the very tokens that others use
                codes = F.embedding(self.vqgan.encode(images), self.vqgan.codebook)  # (B, M, D)
            return codes.transpose(1, 2).reshape(len(images), -1, *self.vqgan.config.grid), 0.0, {}  # (B, D, h, w)
        codes, _, commitment = self.modules["quantizer"](self.modules["encoder"](images))
        metrics = {"commitment": commitment.detach(), **self.quantizer.statistics()}
        return codes, self.objective.commitment * commitment, metrics

    def after_step(self, step: Step) -> None:  # noqa: ARG002
        if self.quantizer is not None:
            self.quantizer.update()

    def validate(self) -> dict[str, float]:
        """PSNR in dB (mean over images) and mean absolute error of held-out reconstructions, and their use of codes."""
        if self.held_out is None:
            return {}
        psnr, error, uses = 0.0, 0.0, torch.zeros(self.vqgan.config.codes)
        for images in image_chunks(self.held_out, self.resolution, self.device):
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
        _, images = self.examples_shown()
        return sheet(images, self._reconstruct(images)[1])

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        self.vqgan.provenance = dict(provenance)
        self.vqgan.save_pretrained(folder)

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vqgan.encode(images)
        return tokens, self.vqgan.decode(tokens).float().clamp(0, 1)


def build(preset: Mapping[str, Any], data: str | Path, where: str, start: FineTune | None = None) -> VqganTask:
    """The task of a VQGAN preset over a dataset; see :func:`digit.training.build.build_task`."""
    model: VQGANConfig = from_dict(VQGANConfig, preset["model"], f"{where}, model")
    objective: VqganObjective = from_dict(VqganObjective, preset["objective"], f"{where}, objective")
    images: ImageData = from_dict(ImageData, preset["data"], f"{where}, data")
    return VqganTask(model, objective, *images.open(data), start)
