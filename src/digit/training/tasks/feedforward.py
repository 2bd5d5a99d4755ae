"""Training a feed-forward ("one-pass") decoder: images from their semantic tokens, in one step, with the losses of the
VQGAN.

A preset has the sections ``model`` (:class:`~digit.models.feedforward.FeedForwardConfig`; vocabulary, grid and classes come
from the tokenizer and the data), ``objective`` (:class:`OnePassObjective`), ``data`` (:class:`OnePassData`) and
``training``.

What the tokens leave open, the noise must decide, and the pixel loss alone would teach the decoder to ignore the noise
and to output the mean. So a small *posterior* network, which is thrown away afterwards, says which noise belongs to an
image: with that noise, half of a batch has to come back pixel by pixel. The other half gets fresh noise, as in use; it
is compared by the discriminator and the deeper perceptual features, hardly by its pixels (BicycleGAN [0]).

Sources: [0] Zhu et al. 2017, arXiv 1711.11586; [1] Esser et al. 2021, arXiv 2012.09841 (the losses); [2] Qiu et al.
2025, arXiv 2509.12474 (RobusTok: disturbed tokens, and training on the prior's own samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import config, to_dict
from digit.core.errors import DigitError
from digit.core.grids import picture_grid
from digit.core.images import to_pil
from digit.data.dataset import ImageDataset
from digit.data.token_cache import TokenCache
from digit.models.component import save_component, weights_checksum
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.transformer import PositiveInt
from digit.models.vqgan import VQGAN
from digit.pipeline.tokenizer import SemanticTokenizer
from digit.sampling.rng import pixel_latents
from digit.training.auxiliary import Auxiliary, neighbours
from digit.training.config import NonNegative
from digit.training.losses.images import PictureLoss, PictureObjective
from digit.training.task import Batch, Groups, Loss, Step, Stream, Task
from digit.training.tasks.images import errors, image_batches, image_chunks, mirrored, some_images
from digit.training.tasks.vqgan import VqganData
from digit.training.views import Share

_SAMPLES = 8
_CODEBOOK = "the model's"  # Auxiliary wants to know that there is one


@config
class OnePassObjective(PictureObjective):
    """What a one-pass decoder is trained for: images like those that the tokens were made of
    (:class:`PictureObjective`).

    Attributes:
        kl: weight of the information (nats an image) that the posterior puts into the noise; 0 trains without a
            posterior, every image with fresh noise.
        fresh_pixels: how much of the pixels' loss the half with fresh noise pays too: an anchor, weak enough to leave
            it its colours.
        posterior_channels: width of the posterior network after its first convolution.
        vq: for the head "vq", weight of the cross entropy of the VQ tokens; the images' losses reach the logits
            through the VQGAN's decoder.
        prefix_noise, prefix_tokens, prefix_neighbours: disturbed input tokens; see
            :class:`~digit.training.auxiliary.Auxiliary`.
        centroid_embeddings: begin with the centroids as token vectors; see there.
        samples: with ``data.samples``, how many images of the prior's own tokens a step adds, as a share of the
            batch. They have no image to be like, so the discriminator alone rates them.
    """

    kl: NonNegative = 1e-4
    fresh_pixels: NonNegative = 0.1
    posterior_channels: PositiveInt = 32
    vq: NonNegative = 1.0
    prefix_noise: Share = 0.0
    prefix_tokens: Share = 0.1
    prefix_neighbours: PositiveInt = 16
    centroid_embeddings: bool = True
    samples: Annotated[float, Field(ge=0, le=1)] = 0.5

    @property
    def auxiliary(self) -> Auxiliary:
        """What disturbs the tokens."""
        names = ("prefix_noise", "prefix_tokens", "prefix_neighbours")
        return Auxiliary(codebook=_CODEBOOK, **{name: getattr(self, name) for name in names})


@config
class OnePassData(VqganData):
    """Which images are learned from.

    Attributes:
        labels: condition on the class.
        tokens: a token cache of the dataset, so that its tokens need not be made again; None makes them in every step.
        samples: a file of the prior's own tokens, as ``digit generate --save-tokens`` writes it, for post-training.
    """

    labels: bool = False
    tokens: str | None = None
    samples: str | None = None


class Posterior(nn.Module):
    """Which noise an image would have: mean and log variance (B, noise_dim) each. Only used in training."""

    def __init__(self, noise_dim: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(before, 2 * noise_dim)
        # begin with a noise that tells something of the image, or the decoder learns to do without
        nn.init.constant_(self.out.bias[noise_dim:], -2.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images (B, 3, S, S) in 0..1, in no more than 64 pixels: light and colours need no detail."""
        side = min(64, images.shape[-1])
        features = self.layers(F.adaptive_avg_pool2d(images, side) * 2 - 1).mean((2, 3))  # (B, 4 C)
        mean, log_variance = self.out(features).float().chunk(2, 1)
        return mean, log_variance.clamp(-8, 8)


class OnePassTask(Task):
    """A feed-forward decoder in training."""

    def __init__(
        self,
        model: FeedForwardDecoder,
        objective: OnePassObjective,
        tokenizer: SemanticTokenizer,
        train: ImageDataset,
        held_out: ImageDataset | None = None,
        data: OnePassData | None = None,
        cache: TokenCache | None = None,
        samples: Tensor | None = None,
        vqgan: VQGAN | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up.

        Args:
            model: to be trained.
            objective: what for.
            tokenizer: makes the tokens, frozen.
            train: images to learn from.
            held_out: what the decoder is measured on; None measures nothing.
            data: whether the class is learned.
            cache: the tokens of ``train`` in the views "center" and "flip", if they are at hand.
            samples: (n, N) tokens of the prior, for post-training.
            vqgan: whose codes the head "vq" predicts.
            start: for the run's description, from which weights it begins, if not from random ones.

        Raises:
            DigitError: the perceptual network is missing or does not fit, or the head needs a VQGAN.
        """
        self.model, self.objective, self.tokenizer = model, objective, tokenizer
        self.data, self.cache, self.samples, self.vqgan = data or OnePassData(), cache, samples, vqgan
        self.modules = nn.ModuleDict({"model": model})
        if objective.kl and model.config.noise_dim:
            self.modules["posterior"] = Posterior(model.config.noise_dim, objective.posterior_channels)
        self.resolution = _resolution(model.config, vqgan)
        self.pictures = PictureLoss(objective, self.resolution)
        if self.pictures.discriminator is not None:
            self.modules["discriminator"] = self.pictures.discriminator
        elif samples is not None:
            raise DigitError(
                "Tokens of the prior have no image to be like; training on them needs objective.gan_weight above 0."
            )
        self.near: Tensor | None = None
        if objective.prefix_noise:
            self.near = neighbours(tokenizer.codebook.centroids, objective.prefix_neighbours)  # (K, m)
        self.train, self.examples, self.held_out = train, len(train), held_out
        self.description = {
            "component": "decoder",
            "model": to_dict(model.config),
            "objective": to_dict(objective),
            "data": {
                "name": train.name,
                "split": train.split,
                "fingerprint": train.fingerprint,
                "labels": self.data.labels,
                "codebook": weights_checksum(tokenizer.codebook),
                "samples": 0 if samples is None else len(samples),
            },
        }
        if start:
            self.description = {**self.description, "start": dict(start)}

    def parameters_by_optimizer(self) -> Groups:
        """Decoder and posterior, and the discriminator apart."""
        ours = [p for name, module in self.modules.items() if name != "discriminator" for p in module.parameters()]
        return {"model": [{"params": ours}], **self.pictures.optimizers()}

    def to_device(self, device: str) -> None:
        """Move the networks, those that only serve too."""
        super().to_device(device)
        self.pictures.to(device)
        self.tokenizer.to(device)
        self.near = None if self.near is None else self.near.to(device)
        if self.vqgan is not None:
            self.vqgan.to(device)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Images as uint8, which of them are mirrored, and the random numbers that disturb their tokens."""
        auxiliary, length = self.objective.auxiliary, self.model.config.prefix_length

        def draw(count: int, generator: torch.Generator) -> Batch:
            empty = torch.zeros(count, length)
            drawn = self.objective.draw(count, generator)
            drawn["drop"] = torch.rand(count, generator=generator)
            if self.samples is not None:
                drawn["sampled"] = self.samples[torch.randint(len(self.samples), (count,), generator=generator)]
            return {**drawn, **auxiliary.draw({"tokens": empty, "prefix": empty}, 0, generator)}

        for batch in image_batches(self.train, self.resolution, stream, draw):
            numbers = batch["index"].numpy()
            if self.cache is not None:
                views = np.where(
                    batch["flip"].numpy(), self.cache.views.index("flip"), self.cache.views.index("center")
                )
                batch["tokens"] = self.cache.tokens("semantic", self.train.numbers[numbers], views)
            if self.data.labels:
                batch["labels"] = self.model.drop_labels(torch.from_numpy(self.train.labels[numbers]), batch["drop"])
            yield batch

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The loss of the images, then the discriminator's once it has begun."""
        images = mirrored(batch)
        truth = batch["tokens"] if "tokens" in batch else self._tokenize(images)
        tokens = self.objective.auxiliary.disturb({**batch, "prefix": truth}, step.progress, self.near).get(
            "prefix", truth
        )
        matched, noise, information, metrics = self._noise(images)
        sampled = batch["sampled"][: round(self.objective.samples * len(images))] if "sampled" in batch else tokens[:0]
        if len(sampled):
            tokens, noise = torch.cat([tokens, sampled]), torch.cat([noise, torch.randn_like(noise[: len(sampled)])])
        labels = batch.get("labels")
        labels = None if labels is None else torch.cat([labels, torch.full_like(sampled[:, 0], -1)])
        loss, rebuilt = self._rebuild(tokens, noise, labels, images)  # (), (B + samples, 3, S, S)
        loss = loss + self.objective.kl * information
        images, rebuilt = (self.objective.moved(some, batch) for some in (images, rebuilt))
        pictures = self.pictures
        with torch.no_grad():
            wanted = pictures.see(images)
        seen = pictures.see(rebuilt)
        value, more = self._likeness(rebuilt[: len(images)], images, [s[: len(images)] for s in seen], wanted, matched)
        loss, metrics = loss + value, {**metrics, **more}
        discriminator = self.modules["discriminator"] if pictures.judges(step) else None
        yield from pictures.losses(loss, metrics, discriminator, rebuilt, images, seen, wanted, step)

    def validate(self) -> dict[str, float]:
        """How held-out images come back from their tokens, with noise as in use.

        PSNR in dB (mean over images) and mean absolute error; "agreement", the share of tokens that the tokenizer finds
        again in the image; and "spread", the mean absolute difference of two images of the same tokens.
        """
        if self.held_out is None:
            return {}
        sums, count = dict.fromkeys(("psnr", "l1", "agreement", "spread"), 0.0), 0
        for images in image_chunks(self.held_out, self.resolution, self.device):
            tokens = self._tokenize(images)
            labels = self._labels_of(count, len(images))
            rebuilt, other = (self._render(tokens, count, seed, labels) for seed in (0, 1))
            psnr, error = errors(rebuilt, images)
            sums["psnr"] += psnr
            sums["l1"] += error
            sums["agreement"] += float((self._tokenize(rebuilt) == tokens).float().mean(1).sum())
            sums["spread"] += float((rebuilt - other).abs().flatten(1).mean(1).sum())
            count += len(images)
        return {name: total / count for name, total in sums.items()}

    def sample(self, step: Step) -> Image.Image | None:  # noqa: ARG002
        """Eight images above two images of their tokens, twice."""
        source = some_images(self.held_out or self.train, 2 * _SAMPLES)
        images = next(image_chunks(source, self.resolution, self.device))
        tokens = self._tokenize(images)
        labels = torch.from_numpy(source.labels).to(self.device) if self.data.labels else None
        rows = [images, *(self._render(tokens, 0, seed, labels) for seed in (0, 1))]
        blocks = [row[start : start + _SAMPLES] for start in range(0, len(images), _SAMPLES) for row in rows]
        cells = [to_pil(image.cpu()) for block in blocks for image in block]
        return picture_grid(cells, columns=min(_SAMPLES, len(images)))

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        """Write the decoder."""
        names = list(self.train.classes) if self.data.labels else []
        save_component(folder, self.model, self.model.config, {**provenance, "class_names": names})

    # -- parts of a step

    def _noise(self, images: Tensor) -> tuple[int, Tensor, Tensor, dict[str, Tensor]]:
        """How many of the images must come back pixel by pixel, all the noise (B, d), and what the posterior put into
        it.
        """
        fresh = torch.randn(len(images), self.model.config.noise_dim, device=images.device)
        if "posterior" not in self.modules:
            return len(images), fresh, fresh.new_zeros(()), {}
        half = (len(images) + 1) // 2
        mean, log_variance = self.modules["posterior"](images[:half])
        information = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2  # nats an image
        own = mean + (log_variance / 2).exp() * fresh[:half]
        return half, torch.cat([own, fresh[half:]]), information, {"information": information.detach()}

    def _rebuild(self, tokens: Tensor, noise: Tensor, labels: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the VQ tokens (0 for pixels), and the images (B', 3, S, S); the images belong to the first
        tokens.
        """
        out = self.modules["model"](tokens, noise, labels).float()
        if self.vqgan is None or self.model.config.pixels is not None:
            return out.new_zeros(()), out
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            targets = self.vqgan.encode(images)  # (B, M)
        value = F.cross_entropy(out[: len(images)].flatten(0, 1), targets.flatten())
        # forward the likeliest code, backward the expected one
        soft = out.softmax(-1) @ self.vqgan.codebook  # (B', M, code_dim)
        hard = F.embedding(out.argmax(-1), self.vqgan.codebook)
        return self.objective.vq * value, self.vqgan.decode_latents(soft + (hard - soft).detach()).float()

    def _likeness(
        self, rebuilt: Tensor, images: Tensor, seen: list[Tensor], wanted: list[Tensor], matched: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The first ``matched`` images must be like their images in every way, the others mostly in what they
        mean.
        """
        near, far, deep = slice(matched), slice(matched, None), slice(len(seen) // 2, None)
        loss, metrics = self._compare(rebuilt, images, seen, wanted, near)
        if matched < len(images):  # shallow layers see colours, which fresh noise may change
            other, _ = self._compare(rebuilt, images, seen[deep], wanted[deep], far, self.objective.fresh_pixels)
            share = matched / len(images)
            loss = share * loss + (1 - share) * other
        return loss, metrics

    def _compare(
        self,
        rebuilt: Tensor,
        images: Tensor,
        seen: list[Tensor],
        wanted: list[Tensor],
        rows: slice,
        weight: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of some rows, the pixels' part of it times ``weight``."""
        loss, metrics = self.pictures.pixels(rebuilt[rows], images[rows])
        distance, more = self.pictures.perceptual(
            rebuilt[rows], images[rows], [s[rows] for s in seen], [w[rows] for w in wanted]
        )
        return weight * loss + distance, {**metrics, **more}

    @torch.no_grad()
    def _tokenize(self, images: Tensor) -> Tensor:
        """Tokens (B, N) of images of the decoder's size; in float32, as they are made in use."""
        size = self.tokenizer.image_size
        with torch.autocast(images.device.type, enabled=False):
            if images.shape[-1] != size:
                images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            tokens: Tensor = self.tokenizer.codebook.assign(self.tokenizer.encoder(images))
        return tokens

    def _render(self, tokens: Tensor, first: int, seed: int, labels: Tensor | None) -> Tensor:
        """Images (B, 3, S, S) in 0..1 of a run's images ``first``, ``first + 1``, ..."""
        own = pixel_latents(self.model.config, range(first, first + len(tokens)), seed).to(tokens.device)
        out: Tensor = self.model(tokens, own, labels).float()
        if self.vqgan is not None and self.model.config.pixels is None:
            out = self.vqgan.decode(out.argmax(-1)).float()
        return out.clamp(0, 1)

    def _labels_of(self, first: int, count: int) -> Tensor | None:
        if self.held_out is None or not self.data.labels:
            return None
        return torch.from_numpy(self.held_out.labels[first : first + count]).to(self.device)


def _resolution(model: FeedForwardConfig, vqgan: VQGAN | None) -> int:
    if model.pixels is not None:
        return model.pixels.resolution
    if vqgan is None:
        raise DigitError(
            "A one-pass decoder with the head 'vq' is trained through a VQGAN; give a model that has one with --model."
        )
    return vqgan.config.resolution
