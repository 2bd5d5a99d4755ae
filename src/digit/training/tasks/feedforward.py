"""Training a feed-forward ("one-pass") decoder: images from their semantic tokens, in one step, with the losses of the
VQGAN.

What the tokens leave open, the noise must decide, and the pixel loss alone would teach the decoder to ignore the noise
and to output the mean. So a small *posterior* network, which is thrown away afterwards, says which noise belongs to an
image: with that noise, half of a batch has to come back pixel by pixel. The other half gets fresh noise, as in use; it
is compared by the discriminator and the deeper perceptual features, hardly by its pixels (BicycleGAN [0]). A decoder
that knows its noise can go on without either: by the energy distance of two draws (``losses/energy.py``).

Sources: [0] Zhu et al. 2017, arXiv 1711.11586; [1] Esser et al. 2021, arXiv 2012.09841 (the losses); [2] Qiu et al.
2025, arXiv 2509.12474 (RobusTok: disturbed tokens, and training on the prior's own samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from digit.core.config import NonNegative, PositiveInt, Share, config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.data.dataset import ImageDataset, open_dataset
from digit.data.token_cache import TokenCache, open_token_cache
from digit.models.component import save_component, weights_checksum
from digit.models.feedforward import FeedForwardConfig, FeedForwardDecoder
from digit.models.vqgan import VQGAN
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokenizer import SemanticTokenizer
from digit.pipeline.tokens import load_tokens_file
from digit.sampling.rng import pixel_latents
from digit.training.auxiliary import Auxiliary, neighbours, set_embeddings
from digit.training.finetune import FineTune, saved_part, take_modules
from digit.training.losses.images import ImageLoss, ImageObjective
from digit.training.task import Batch, Loss, Step, Stream
from digit.training.tasks.images import (
    ImageData,
    ImageTask,
    described,
    errors,
    flipped,
    image_batches,
    image_chunks,
    sheet,
)
from digit.training.tasks.tokens import fitted


@config
class OnePassObjective(ImageObjective):
    """What a feed-forward decoder is trained for, as ``presets/bases/onepass.yaml`` explains. Images of the prior's own
    tokens (``samples``) have no image to be like, so the discriminator alone rates them.
    """

    energy: NonNegative = 0.0
    kl: NonNegative = 1e-4
    fresh_pixels: NonNegative = 0.1
    posterior_channels: PositiveInt = 32
    vq: NonNegative = 1.0
    prefix_noise: Share = 0.0
    prefix_tokens: Share = 0.1
    prefix_neighbours: PositiveInt = 16
    centroid_embeddings: bool = True
    samples: Share = 0.5

    @property
    def auxiliary(self) -> Auxiliary:
        """What disturbs the tokens."""
        names = ("prefix_noise", "prefix_tokens", "prefix_neighbours")
        return Auxiliary(codebook="the model's", **{name: getattr(self, name) for name in names})


@config
class OnePassData(ImageData):
    """Which images are learned from, and where their tokens come from; see ``presets/bases/onepass.yaml``."""

    labels: bool = False
    tokens: str | None = None
    samples: str | None = None


class Posterior(nn.Module):
    """Mean and log variance (B, noise_dim) of an image's noise [0]; it serves training alone."""

    def __init__(self, noise_dim: int, channels: int) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels)
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], 2 * noise_dim)
        # begin with a noise that tells something of the image, or the decoder learns to do without
        nn.init.constant_(self.out.bias[noise_dim:], -2.0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images (B, 3, S, S) in 0..1, in no more than 64 pixels: light and colours need no detail."""
        side = min(64, images.shape[-1])
        features = self.layers(F.adaptive_avg_pool2d(images, side) * 2 - 1).mean((2, 3))  # (B, 4 C)
        mean, log_variance = self.out(features).float().chunk(2, 1)
        return mean, log_variance.clamp(-8, 8)


def drawn(mean: Tensor, log_variance: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Noise (B, d) made of ``fresh`` normal numbers (B, d), and what it tells of the image: () nats, the mean."""
    information = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
    return mean + (log_variance / 2).exp() * fresh, information


class OnePassTask(ImageTask):
    """A feed-forward decoder in training."""

    objective: OnePassObjective

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
        """Train ``model`` for ``objective`` on images whose tokens the frozen ``tokenizer`` makes.

        Args:
            cache: the tokens of ``train`` in the views "center" and "flip", if they are at hand.
            samples: (n, N) tokens of the prior, for post-training.
            vqgan: whose codes the head "vq" predicts.
            start: for the run's description, from which weights it begins, if not from random ones.

        Raises:
            DigitError: the perceptual network is missing or does not fit, or the head needs a VQGAN.
        """
        self.model, self.tokenizer, self.vqgan = model, tokenizer, vqgan
        self.data, self.cache, self.samples = data or OnePassData(), cache, samples
        networks: dict[str, nn.Module] = {"model": model}
        if objective.energy and not model.config.noise_dim:
            raise DigitError("objective.energy compares two draws of the noise; it needs model.noise_dim above 0.")
        if objective.kl and model.config.noise_dim and not objective.energy:
            networks["posterior"] = Posterior(model.config.noise_dim, objective.posterior_channels)
        if model.config.pixels is not None:
            resolution = model.config.pixels.resolution
        elif vqgan is not None:
            resolution = vqgan.config.resolution
        else:
            raise DigitError("The head 'vq' is trained through a VQGAN; give a model that has one with --model.")
        codebook = weights_checksum(tokenizer.codebook)
        more = {"labels": self.data.labels, "codebook": codebook, "samples": 0 if samples is None else len(samples)}
        description = {"component": "decoder", "model": to_dict(model.config), "data": {**described(train), **more}}
        if start:
            description["start"] = dict(start)
        frozen = [vqgan] if vqgan is not None else []
        criterion = ImageLoss(objective, resolution, energy_weight=objective.energy)
        super().__init__(networks, criterion, resolution, train, held_out, description, frozen)
        if samples is not None and "discriminator" not in self.modules:
            raise DigitError(
                "Tokens of the prior have no image to be like; training on them needs objective.gan_weight above 0."
            )
        self.near: Tensor | None = None
        if objective.prefix_noise:
            self.near = neighbours(tokenizer.codebook.centroids, objective.prefix_neighbours, tokenizer.depth)  # (K, m)

    def to_device(self, device: str) -> None:
        super().to_device(device)
        self.tokenizer.to(device)
        self.near = None if self.near is None else self.near.to(device)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Images as uint8, which of them are flipped, and the random numbers that disturb their tokens."""
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
                flip, center = (self.cache.views.index(name) for name in ("flip", "center"))
                views = np.where(batch["flip"].numpy(), flip, center)
                batch["tokens"] = self.cache.tokens("semantic", self.train.numbers[numbers], views)
            if self.data.labels:
                batch["labels"] = self.model.drop_labels(torch.from_numpy(self.train.labels[numbers]), batch["drop"])
            yield batch

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The loss of the images, then the discriminator's once it has begun."""
        images = flipped(batch)
        truth = batch["tokens"] if "tokens" in batch else self._tokenize(images)
        shown = self.objective.auxiliary.disturb({**batch, "prefix": truth}, step.progress, self.near)
        tokens = shown.get("prefix", truth)
        matched, own, information, metrics = self._noise(images)
        labels = batch.get("labels")
        if self.objective.energy:  # each image is drawn twice
            tokens, own = torch.cat([tokens, tokens]), torch.cat([own, torch.randn_like(own)])
            labels = None if labels is None else torch.cat([labels, labels])
        sampled = batch["sampled"][: round(self.objective.samples * len(images))] if "sampled" in batch else tokens[:0]
        if len(sampled):
            tokens, own = torch.cat([tokens, sampled]), torch.cat([own, torch.randn_like(own[: len(sampled)])])
        labels = None if labels is None else torch.cat([labels, torch.full_like(sampled[:, 0], -1)])
        loss, rebuilt = self._rebuild(tokens, own, labels, images)  # (), (B or 2 B + samples, 3, S, S)
        loss = loss + self.objective.kl * information
        fresh = self.objective.fresh_pixels
        return self.criterion(loss, metrics, rebuilt, images, batch, step, self.modules, matched, fresh)

    def validate(self) -> dict[str, float]:
        """How held-out images come back from their tokens, with noise as in use: PSNR in dB (mean over images) and mean
        absolute error; "agreement", the share of tokens that the tokenizer finds again in the image; and "spread", the
        mean absolute difference of two images of the same tokens.
        """
        if self.held_out is None:
            return {}
        sums, count = dict.fromkeys(("psnr", "l1", "agreement", "spread"), 0.0), 0
        for images in image_chunks(self.held_out, self.resolution, self.device):
            tokens = self._tokenize(images)
            labels = self._labels(self.held_out, slice(count, count + len(images)))
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
        source, images = self.examples_shown()
        tokens, labels = self._tokenize(images), self._labels(source, slice(None))
        return sheet(images, *(self._render(tokens, 0, seed, labels) for seed in (0, 1)))

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        names = list(self.train.classes) if self.data.labels else []
        save_component(folder, self.model, self.model.config, {**provenance, "class_names": names})

    # -- parts of a step

    def _noise(self, images: Tensor) -> tuple[int, Tensor, Tensor, dict[str, Tensor]]:
        """How many images must come back pixel by pixel, all the noise (B, d), and what the posterior put into it."""
        fresh = torch.randn(len(images), self.model.config.noise_dim, device=images.device)
        if "posterior" not in self.modules:
            return len(images), fresh, fresh.new_zeros(()), {}
        half = (len(images) + 1) // 2
        mean, log_variance = self.modules["posterior"](images[:half])
        own, information = drawn(mean, log_variance, fresh[:half])
        return half, torch.cat([own, fresh[half:]]), information, {"information": information.detach()}

    def _rebuild(self, tokens: Tensor, own: Tensor, labels: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the VQ tokens (0 for pixels), and what is made (B', 3, S, S); its first rows have ``images``."""
        out = self.modules["model"](tokens, own, labels).float()
        if self.vqgan is None or self.model.config.pixels is not None:
            return out.new_zeros(()), out
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            targets = self.vqgan.encode(images)  # (B, M)
        value = F.cross_entropy(out[: len(images)].flatten(0, 1), targets.flatten())
        # forward the most likely code, backward the expected one
        soft = out.softmax(-1) @ self.vqgan.codebook  # (B', M, code_dim)
        hard = F.embedding(out.argmax(-1), self.vqgan.codebook)
        return self.objective.vq * value, self.vqgan.decode_latents(soft + (hard - soft).detach()).float()

    @torch.no_grad()
    def _tokenize(self, images: Tensor) -> Tensor:
        """Tokens (B, N) of images of the decoder's size; in float32, as they are made in use."""
        size = self.tokenizer.image_size
        with torch.autocast(images.device.type, enabled=False):
            if images.shape[-1] != size:
                images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
            tokens: Tensor = self.tokenizer.codebook.tokens(self.tokenizer.encoder(images))
        return tokens

    def _render(self, tokens: Tensor, first: int, seed: int, labels: Tensor | None) -> Tensor:
        """Images (B, 3, S, S) in 0..1 of a run's images ``first``, ``first + 1``, ..."""
        own = pixel_latents(self.model.config, range(first, first + len(tokens)), seed).to(tokens.device)
        out: Tensor = self.model(tokens, own, labels).float()
        if self.vqgan is not None and self.model.config.pixels is None:
            out = self.vqgan.decode(out.argmax(-1)).float()
        return out.clamp(0, 1)

    def _labels(self, images: ImageDataset, rows: slice) -> Tensor | None:
        return torch.from_numpy(images.labels[rows]).to(self.device) if self.data.labels else None


def build(
    preset: Mapping[str, Any],
    data: str | Path,
    where: str,
    parts: DigitPipeline | None,
    start: FineTune | None = None,
) -> OnePassTask:
    """The task of a preset over a dataset, and the encoder, codebook and (for the head "vq") VQGAN of ``parts``."""
    if parts is None or parts.encoder is None or parts.codebook is None:
        raise DigitError(
            "A feed-forward decoder is trained on images and their semantic tokens: give the model whose encoder and "
            "codebook make them with --model, and a dataset (not a token cache) with --data."
        )
    tokenizer = parts.tokenizer
    objective: OnePassObjective = from_dict(OnePassObjective, preset["objective"], f"{where}, objective")
    choice: OnePassData = from_dict(OnePassData, preset["data"], f"{where}, data")
    train, held_out = choice.open(data)
    shape = _shape(preset["model"], tokenizer, parts.vqgan, train if choice.labels else None, f"{where}, model")
    model, origin = FeedForwardDecoder(shape), dict[str, Any]()
    if start is not None:

        def fits(saved: FeedForwardDecoder) -> bool:  # what has no weights may be another: dropout, the fixed filter
            pixels = saved.config.pixels
            if pixels is not None and shape.pixels is not None:
                pixels = replace(pixels, smoothing=shape.pixels.smoothing)
            known = replace(saved.config, class_dropout=shape.class_dropout, transformer=shape.transformer)
            return replace(known, pixels=pixels) == shape

        origin = saved_part(start, "onepass", FeedForwardDecoder.from_pretrained, model, fits)
    elif objective.centroid_embeddings:
        set_embeddings(model.token_embedding, tokenizer.codebook.centroids)
    cache = None if choice.tokens is None else _open_cache(choice.tokens, data, choice.split, tokenizer)
    samples = None if choice.samples is None else _open_samples(choice.samples, tokenizer)
    vqgan = None if parts.vqgan is None or shape.head == "pixels" else parts.vqgan.requires_grad_(False)
    task = OnePassTask(model, objective, tokenizer, train, held_out, choice, cache, samples, vqgan, origin)
    if start is not None:
        # a decoder gives its noise a meaning; a posterior that begins anew would not know it
        take_modules(task.modules, start.source, ("posterior", "discriminator"))
    return task


def _shape(
    values: Mapping[str, Any],
    tokenizer: SemanticTokenizer,
    vqgan: VQGAN | None,
    labelled: ImageDataset | None,
    where: str,
) -> FeedForwardConfig:
    """The config: what ``values`` leaves out comes from the tokenizer, the VQGAN and the classes."""
    grid, depth = tokenizer.encoder.grid, tokenizer.depth
    known = {"prefix_vocab_size": tokenizer.vocab_size, "grid": list(grid), "codebook_depth": depth, "num_classes": 0}
    if labelled is not None:
        known["num_classes"] = max(len(labelled.classes), int(labelled.labels.max()) + 1)
        if int(labelled.labels.min()) < 0:
            raise DigitError(f"{where} asks for class labels, but images of {labelled.name} have none.")
    if values.get("head") == "vq" and vqgan is not None:
        if vqgan.config.grid != grid:
            raise DigitError(
                f"The head 'vq' gives one VQ token for each semantic token, but the VQGAN has {vqgan.config.grid} of "
                f"them and the tokenizer {grid}; use the head 'pixels'."
            )
        known["vocab_size"] = vqgan.config.codes
    return from_dict(FeedForwardConfig, fitted(values, known, where, "the tokenizer or the data"), where)


def _open_cache(folder: str, data: str | Path, split: str, tokenizer: SemanticTokenizer) -> TokenCache:
    """The cache of a dataset's tokens, seen to be of this dataset and this tokenizer."""
    cache, dataset = open_token_cache(folder), open_dataset(data, split)
    if cache.info["source"]["fingerprint"] != dataset.fingerprint:
        raise DigitError(
            f"The tokens in {folder} are not of {data}, {split}: leave data.tokens out, or make them anew."
        )
    if not {"center", "flip"} <= set(cache.views):
        raise DigitError(
            f"The cache {folder} has the views {', '.join(cache.views)}; a feed-forward decoder needs center and flip."
        )
    images = next(image_chunks(dataset.subset(range(min(16, len(dataset)))), tokenizer.image_size, "cpu"))
    stored = cache.tokens("semantic", np.arange(len(images)), cache.views.index("center"))  # (b, N)
    fits = stored.shape == (len(images), tokenizer.num_tokens)
    if not fits or float((tokenizer.encode(images) == stored).float().mean()) < 0.9:
        raise DigitError(f"The tokens in {folder} were made with another encoder or codebook than those of --model.")
    return cache


def _open_samples(path: str, tokenizer: SemanticTokenizer) -> Tensor:
    """Tokens (n, N) of the prior."""
    tokens, count, size = load_tokens_file(path).semantic, tokenizer.num_tokens, tokenizer.vocab_size
    if tokens is None or tokens.ndim != 2 or tokens.shape[1] != count or int(tokens.max()) >= size:
        found = "none" if tokens is None else f"{tuple(tokens.shape)} up to {int(tokens.max())}"
        raise DigitError(
            f"data.samples = {path} should hold semantic tokens (n, {count}) below {size}; it has: {found}."
        )
    return tokens
