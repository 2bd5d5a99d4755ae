"""The ways to train an encoder: SimCLR and VICReg on two views of an image; DINO and iBOT, as DINOv2 joins them, with a
teacher that is a moving average of the student; and the masked autoencoder, the reconstructive baseline of the paper's
figure 4a. The losses and heads of all but the last are lightly's.

Sources: Chen et al. 2020, arXiv 2002.05709 (SimCLR); Bardes et al. 2021, arXiv 2105.04906 (VICReg); Caron et al. 2021,
arXiv 2104.14294 (DINO); Zhou et al. 2021, arXiv 2111.07832 (iBOT); Oquab et al. 2023, arXiv 2304.07193 (DINOv2); He et
al. 2021, arXiv 2111.06377 (MAE). The dense term of pairs contrasts patches as Wang et al. 2021, arXiv 2011.09157
(DenseCL) do, matched by their location as in Bardes et al. 2022, arXiv 2210.01571 (VICRegL).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import NonNegative, NonNegativeInt, Positive, PositiveInt, Share, config
from digit.core.errors import DigitError, require
from digit.encoders.conv import ConvEncoder
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.models.transformer import Transformer, TransformerConfig, init_weights
from digit.training.task import Batch, Step
from digit.training.views import ViewDraws, Views, apply_views, draw_views

TrainableEncoder = ConvEncoder | TransformersEncoder
Learned = tuple[Tensor, dict[str, Tensor]]
"""A loss () and metrics."""


class Method:
    """A way to learn features.

    Attributes:
        encoder: what is validated and exported.
        kinds: the views that are made of every image.
        modules: what a checkpoint keeps; ``modules["student"]`` is trained, and the loop may wrap it.
    """

    def __init__(self, encoder: TrainableEncoder, kinds: Sequence[Views], masks: bool = False) -> None:
        """Take the network; a DigitError where it cannot be trained so. ``masks`` needs a ViT with a mask token."""
        if encoder.preprocessing.resize is not None:
            raise DigitError("An encoder is trained on views of its own size: leave preprocessing.resize out.")
        network: Any = getattr(encoder, "network", None)
        if masks and getattr(getattr(network, "embeddings", None), "mask_token", None) is None:
            raise DigitError(
                "This method hides patches from the network, which needs a DINOv2-like ViT (model.kind: vit); "
                "for a convolutional encoder choose simclr, vicreg, or dino with patch_weight 0."
            )
        self.encoder, self.kinds, self.modules = encoder, kinds, nn.ModuleDict()

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of ``count`` examples, one row each; here of their views."""
        drawn = [draw_views(count, views, generator) for views in self.kinds]
        return {f"view{i}.{name}": value for i, draws in enumerate(drawn) for name, value in draws._asdict().items()}

    def view(self, images: Tensor, batch: Batch, number: int, size: int | None = None) -> Tensor:
        """A view (B, 3, s, s) of images, as it was drawn."""
        draws = ViewDraws(*(batch[f"view{number}.{name}"] for name in ViewDraws._fields))
        return apply_views(images, draws, size or self.kinds[number].size)

    def loss(self, images: Tensor, batch: Batch, step: Step) -> Learned:
        """The loss of images (B, 3, S, S) in 0..1."""
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """What moves besides the optimizer; here nothing."""


class Projection(nn.Module):
    """An encoder with a head on the image's vector and, where patches are learned from too, one on theirs."""

    def __init__(self, encoder: TrainableEncoder, head: nn.Module, patch_head: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.patch_head = patch_head

    def forward(self, images: Tensor, masked: Tensor | None = None, take: Tensor | None = None) -> tuple[Tensor, ...]:
        """Projections (B, P) of views, which may be smaller than the encoder's images, the vectors (B, D) they were
        made of, and with a patch head those of the n patches of ``take``, (B, N) bool or (n,) indices into all B * N
        patches, (n, P); all in float32. The
        vector is the CLS token of a ViT, which sees its mask token at ``masked`` (B, N) bool, or the mean of a
        convolutional grid.
        """
        pixels = self.encoder.preprocessing(images)
        if isinstance(self.encoder, ConvEncoder):
            patches = self.encoder.features(pixels)  # (B, N, D)
            vector = patches.mean(1)
        else:
            states = self.encoder.network(pixels, bool_masked_pos=masked).last_hidden_state  # (B, 1 + N, D)
            vector, patches = states[:, 0], states[:, self.encoder.prefix :]
        out = (self.head(vector).float(), vector.float())
        if take is None or self.patch_head is None:
            return out
        return (*out, self.patch_head(patches.flatten(0, 1)[take.flatten()]).float())


def exact(images: Tensor) -> Any:
    """A block in which autocast is off, for losses that 16 bits would blur."""
    return torch.autocast(images.device.type, enabled=False)


def spread(vectors: Tensor) -> Tensor:
    """How spread unit vectors (B, D) are: the root of their mean variance times D; 1 uniformly spread, 0 collapsed."""
    unit = F.normalize(vectors.detach(), dim=1)
    return unit.var(0).sum().sqrt()


@config
class PairObjective:
    """Projections of two views of an image should be alike, and those of other images apart, or of much variance and
    little covariance ("vicreg"). ``presets/bases/cifar10-simclr.yaml`` explains the fields, and these beside them.

    Attributes:
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
        super().__init__(encoder, [objective.views] * 2)
        heads = require("lightly.models.modules.heads", "train", "training an encoder")
        losses = require("lightly.loss", "train", "training an encoder")
        self.objective = objective
        shape = encoder.dim, objective.hidden, objective.dim
        dense_head = heads.SimCLRProjectionHead(*shape) if objective.dense else None
        self.modules["student"] = Projection(encoder, heads.SimCLRProjectionHead(*shape), dense_head)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        contrast = partial(losses.NTXentLoss, objective.temperature)
        self.criterion = (contrast if objective.method == "simclr" else losses.VICRegLoss)(gather_distributed=several)
        self.dense_criterion = contrast()
        # patches of a view's row
        self.side = encoder.grid[0] * objective.views.size // encoder.preprocessing.image_size

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of both views and, for the dense term, an order of a view's patches (count, N)."""
        drawn = super().draw(count, generator)
        if self.objective.dense:
            drawn["order"] = torch.rand(count, self.side**2, generator=generator)
        return drawn

    def loss(self, images: Tensor, batch: Batch, _step: Step) -> Learned:
        """How unlike the projections of both views are, and those of patches that show one place."""
        views = torch.cat([self.view(images, batch, i) for i in range(2)])
        take = None
        if self.objective.dense:
            with exact(images):
                crops = batch["view0.crop"], batch["view1.crop"]
                take = matched_places(*crops, batch["order"], self.side, self.objective.dense_places)
        projections, vectors, *patches = self.modules["student"](views, take=take)  # (2 B, P), (2 B, D), (2 n, P)
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


@config
class DistillationObjective:
    """The student's view of an image should be assigned to the same prototypes as the teacher's other view. The fields
    are explained in ``presets/cifar10-encoder-vit.yaml``; convolutional networks want ``batch_norm`` in the heads.
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
        kinds = [objective.views] * 2 + [objective.local_views] * objective.local_count
        super().__init__(student, kinds, masks=objective.patch_weight > 0)
        losses = require("lightly.loss", "train", "training an encoder")
        self.encoder, self.objective = teacher, objective
        first, second = objective.teacher_temperature
        self.modules["student"] = _with_heads(student, objective)
        self.modules["teacher"] = _with_heads(teacher, objective).requires_grad_(False)
        self.modules["dino"] = losses.DINOLoss(objective.prototypes, first, second)
        self.modules["ibot"] = losses.IBOTPatchLoss(objective.prototypes, second)
        self.modules["teacher"].load_state_dict(self.modules["student"].state_dict())
        self.koleo = losses.KoLeoLoss()
        size = objective.views.size
        self.patches = student.grid[0] * size // student.preprocessing.image_size
        if student.grid[0] * size % student.preprocessing.image_size:
            raise DigitError(f"Views of {size} pixels are not a whole number of this encoder's patches.")

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of all views, and which patches of the large ones are hidden."""
        batch = super().draw(count, generator)
        low, high = self.objective.masked_share
        for i in range(2 if self.objective.patch_weight else 0):  # in some of the images, a random part of the patches
            share = torch.rand(count, generator=generator) * (high - low) + low
            share *= torch.rand(count, generator=generator) < self.objective.masked_images
            order = torch.rand(count, self.patches**2, generator=generator).argsort(1).argsort(1)  # (B, N) ranks
            batch[f"masked{i}"] = order < (share * self.patches**2).round()[:, None]  # (B, N) bool
        return batch

    def loss(self, images: Tensor, batch: Batch, step: Step) -> Learned:
        """How unlike the teacher the student assigns views, and hidden patches."""
        objective = self.objective
        large = torch.cat([self.view(images, batch, i) for i in range(2)])
        masked = torch.cat([batch["masked0"], batch["masked1"]]) if objective.patch_weight else None  # (2 B, N)
        with torch.no_grad():
            target, _, *target_patches = self.modules["teacher"](large, take=masked)
        projected, vectors, *patches = self.modules["student"](large, masked, masked)
        views = list(projected.chunk(2))  # (B, P) each
        if objective.local_count:
            small = torch.cat([self.view(images, batch, 2 + i) for i in range(objective.local_count)])
            views += self.modules["student"](small)[0].chunk(objective.local_count)
        first, last = objective.teacher_temperature
        temperature = first + (last - first) * min(1.0, step.progress / max(objective.temperature_warmup, 1e-6))
        with exact(images):
            loss = self.modules["dino"](list(target.chunk(2)), views, temperature)
            metrics = {"dino": loss.detach(), "feature_spread": spread(vectors)}
            if masked is not None:
                grid = masked.view(-1, self.patches, self.patches)
                patch_loss = self.modules["ibot"](target_patches[0], patches[0], grid, temperature)
                loss = loss + objective.patch_weight * patch_loss
                metrics["ibot"] = patch_loss.detach()
            if objective.koleo_weight:
                loss = loss + objective.koleo_weight * sum(self.koleo(v) for v in vectors.chunk(2))
        return loss, metrics

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Move the teacher towards the student."""
        momentum = 1 - (1 - self.objective.teacher_momentum) * (math.cos(math.pi * step.progress) + 1) / 2
        teacher: list[Tensor] = list(self.modules["teacher"].parameters())
        student: list[Tensor] = list(self.modules["student"].parameters())
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


@config
class MaskedAutoencoderObjective:
    """Hidden patches of an image (``hidden_share`` of them) should be rebuilt from the visible ones, which alone are
    encoded, by a light decoder that is thrown away. The loss is the mean squared error of their pixels, each patch
    normalised.
    """

    method: Literal["mae"] = "mae"
    views: Views = Views(scale=(0.5, 1.0), jitter=0.0, gray=0.0)
    hidden_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    decoder_dim: PositiveInt = 96
    decoder_depth: PositiveInt = 2
    decoder_heads: PositiveInt = 3


class MaskedAutoencoder(nn.Module):
    """A ViT encoder and the decoder that rebuilds what it did not see."""

    def __init__(self, encoder: TransformersEncoder, objective: MaskedAutoencoderObjective) -> None:
        super().__init__()
        self.encoder = encoder
        dim = objective.decoder_dim
        patches = encoder.grid[0] * encoder.grid[1]
        self.visible = max(1, round(patches * (1 - objective.hidden_share)))
        self.embed = nn.Linear(encoder.dim, dim)
        self.hidden_token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.randn(patches, dim) * 0.02)
        shape = TransformerConfig(dim=dim, depth=objective.decoder_depth, heads=objective.decoder_heads, causal=False)
        self.decoder = Transformer(shape)
        self.to_pixels = nn.Linear(dim, 3 * encoder.patch**2)
        for part in (self.embed, self.decoder, self.to_pixels):
            init_weights(part)

    def forward(self, images: Tensor, order: Tensor) -> Tensor:
        """The loss () of images (B, 3, S, S) in 0..1; the first patches in ``order`` (B, N) are the visible ones."""
        network: Any = self.encoder.network
        pixels = self.encoder.preprocessing(images)
        tokens = network.embeddings(pixels)  # (B, 1 + N, D)
        seen, hidden = order[:, : self.visible], order[:, self.visible :]  # (B, V), (B, N - V)
        visible = torch.take_along_dim(tokens[:, self.encoder.prefix :], seen[..., None], 1)  # (B, V, D)
        chosen = torch.cat([tokens[:, :1], visible], 1)  # (B, 1 + V, D)
        states = network.layernorm(network.encoder(chosen).last_hidden_state)
        known = self.embed(states[:, 1:]) + self.positions[seen]  # (B, V, d)
        asked = self.hidden_token + self.positions[hidden]  # (B, N - V, d)
        rebuilt = self.to_pixels(self.decoder(torch.cat([known, asked.to(known.dtype)], 1))[:, self.visible :])
        size = self.encoder.patch
        patches = F.unfold(images, size, stride=size).transpose(1, 2)  # (B, N, 3 * size * size)
        target = torch.take_along_dim(patches, hidden[..., None], 1)
        target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        return F.mse_loss(rebuilt.float(), target)


class MaskedAutoencoderMethod(Method):
    """MAE on a ViT."""

    def __init__(self, encoder: TrainableEncoder, objective: MaskedAutoencoderObjective) -> None:
        super().__init__(encoder, [objective.views], masks=True)
        assert isinstance(encoder, TransformersEncoder)
        self.patches = encoder.grid[0] * encoder.grid[1]
        self.modules["student"] = MaskedAutoencoder(encoder, objective)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of the view, and the order of its patches, of which the first are visible."""
        batch = super().draw(count, generator)
        return {**batch, "order": torch.rand(count, self.patches, generator=generator).argsort(1)}

    def loss(self, images: Tensor, batch: Batch, _step: Step) -> Learned:
        """How far the hidden patches are from what is rebuilt."""
        view = self.view(images, batch, 0, self.encoder.preprocessing.image_size)
        return self.modules["student"](view, batch["order"]), {}
