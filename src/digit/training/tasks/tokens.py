"""Training a token model over a token cache: the prior, the AR and the masked decoder, and the VQ baselines.

What is trained follows from the model's role and from which tokens it predicts:

| role | ``data.target`` | ``data.prefix`` | what |
|---|---|---|---|
| prior | semantic | none | the prior, stage 1 |
| ar | vq | semantic | the AR decoder, stage 2 |
| masked | vq | semantic | the masked decoder, stage 2 (MaskGIT, Chang et al. 2022, arXiv 2202.04200) |
| masked, random | semantic | none | a masked or a random-order prior: stage 1 in a few steps |
| prior, masked | vq | none | the baselines over VQ tokens alone |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrize

from digit.core.config import NonNegativeInt, config, from_dict, to_dict
from digit.core.errors import DigitError
from digit.core.grids import image_grid, token_image
from digit.core.images import to_pil
from digit.data.sampling import StepSampler
from digit.data.token_cache import TokenCache
from digit.models.component import save_component, without_weights
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.models.vqgan import VQGAN
from digit.sampling.request import SamplingParams
from digit.sampling.sampler import sample
from digit.training.auxiliary import Auxiliary
from digit.training.health import Counts
from digit.training.task import Batch, Loss, Step, Stream, Task

# which images are held out never changes, or a resumed or repeated run would learn its own test
_HELD_OUT_SEED = 20241031
_MASK_SEED = 7  # of the masks that validation hides tokens with
_VALIDATION_BATCH = 64
_COUNTED = 50_000  # images whose tokens are counted for the baselines of validation
_SAMPLES = 16
_INPUTS = ("tokens", "labels", "prefix", "mask", "order")  # of a batch, for the network


@config
class TokenData:
    """Which tokens of a cache are learnt, as ``presets/bases/tokens.yaml`` explains; at most a tenth is held out."""

    target: Literal["semantic", "vq"] = "semantic"
    prefix: Literal["semantic"] | None = None
    labels: bool = False
    views: tuple[str, ...] | None = None
    held_out: NonNegativeInt = 512

    def __post_init__(self) -> None:
        if self.target == "semantic" and self.prefix:
            raise ValueError("semantic tokens cannot be predicted from themselves: target 'semantic' needs prefix null")


def token_model_config(values: Mapping[str, Any], cache: TokenCache, data: TokenData, where: str) -> TokenModelConfig:
    """The config of a model for a cache: vocabularies, lengths and classes that ``values``, read from ``where``, leaves
    out come from the cache. A DigitError where a field is wrong, or is given and does not fit the cache.
    """
    target = cache.space(data.target)
    known = {"vocab_size": target.vocab_size, "length": target.length, "num_classes": 0, "codebook_depth": target.depth}
    if data.prefix:
        prefix = cache.space(data.prefix)
        known |= {"prefix_vocab_size": prefix.vocab_size, "prefix_length": prefix.length}
    if data.labels:
        known["num_classes"] = max(len(cache.classes), int(cache.labels.max()) + 1)
        if int(cache.labels.min()) < 0:
            raise DigitError(f"{where} asks for class labels, but images of the cache {cache.folder} have none.")
    return from_dict(TokenModelConfig, fitted(values, known, where, f"the cache {cache.folder}"), where)


def fitted(values: Mapping[str, Any], known: Mapping[str, Any], where: str, what: str) -> dict[str, Any]:
    """Fields of a model with those that are ``known`` from ``what``; DigitError where one in ``where`` differs."""
    wrong = [
        f"{name} = {values[name]} (expected: {value})"
        for name, value in known.items()
        if values.get(name, value) != value
    ]
    if wrong:
        raise DigitError(f"{where} does not fit {what}: {', '.join(wrong)}. Leave these fields out.")
    return {**values, **known}


class TokenLoss(nn.Module):
    """A token model as the loop trains it: its forward pass is its loss, so that it may be wrapped and compiled."""

    def __init__(self, model: TokenModel, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model, self.z_loss = model, z_loss

    def forward(self, tokens: Tensor, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TokenModel.loss`."""
        return self.model.loss(tokens, z_loss=self.z_loss if self.training else 0.0, **batch)


def merged(model: TokenModel) -> TokenModel:
    """The model with its low-rank changes merged into the weights; a new one if it has any."""
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    with without_weights():
        found = TokenModel(model.config)
    # a parametrized weight, read as an attribute, is the changed one
    tensors = {name: attrgetter(name)(model).detach().clone() for name in found.state_dict()}
    found.load_state_dict(tensors, assign=True)
    return found.train(model.training)


class TokenTask(Task):
    """A token model learns the tokens of a cache.

    Args:
        vqgan: turns samples of VQ tokens into images for the log; without it they are shown as coloured cells.
        auxiliary, near: how inputs are disturbed; see :meth:`Auxiliary.disturb`.
        start: for the run's description, from which weights it begins, if not from random ones.
    """

    score = "nll"

    def __init__(
        self,
        model: TokenModel,
        cache: TokenCache,
        data: TokenData,
        component: str = "prior",
        z_loss: float = 0.0,
        vqgan: VQGAN | None = None,
        auxiliary: Auxiliary | None = None,
        near: Tensor | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.cache, self.data, self.vqgan = model, cache, data, vqgan
        self.auxiliary, self._near = auxiliary or Auxiliary(), near
        self.modules = nn.ModuleDict({"model": TokenLoss(model, z_loss)})
        shuffled = np.random.default_rng(_HELD_OUT_SEED).permutation(len(cache))
        held_out = min(data.held_out, len(cache) // 10)
        self._held_out, self._train = np.sort(shuffled[:held_out]), np.sort(shuffled[held_out:])
        chosen = cache.views if data.views is None else list(data.views)
        unknown = [name for name in chosen if name not in cache.views]
        if unknown or not chosen:
            raise DigitError(
                f"The views {', '.join(unknown) or '(none)'} were asked for; the cache has: {', '.join(cache.views)}."
            )
        self._views = np.array([cache.views.index(name) for name in chosen])
        self.examples = len(self._train)
        # named only where there is something to name, so that a run without them is the same as ever
        more = {"objective": self.auxiliary.chosen, "start": dict(start or {})}
        self.description = {
            "component": component,
            "model": to_dict(model.config),
            "data": {**to_dict(data), "cache": cache.fingerprint},
            **{name: value for name, value in more.items() if value},
        }

    def to_device(self, device: str) -> None:
        """Move the model, and the VQGAN that shows its samples."""
        super().to_device(device)
        self._near = None if self._near is None else self._near.to(device)
        if self.vqgan is not None:
            self.vqgan.to(device)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Tokens of a random view of each image, with masks and dropped labels: drawn for the global batch, and then
        cut.
        """
        sampler = StepSampler(self.examples, stream.batch_size, stream.seed)
        for step in range(stream.start, stream.stop):
            images = self._train[sampler.indices(step)]
            rng = np.random.default_rng([stream.seed, step])
            views = self._views[rng.integers(len(self._views), size=len(images))]
            generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
            yield {name: tensor[stream.rows] for name, tensor in self._batch(images, views, generator).items()}

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """Cross entropy of the next tokens, or of the masked ones, with what the objective disturbs."""
        shown = self.auxiliary.disturb(batch, step.progress, self._near)
        value, metrics = self.modules["model"](**{name: batch.get(name) for name in _INPUTS} | shown)
        if "mask" in batch:
            # the mean is over the masked places of the global batch, of which this part may hold more or less than its
            # share
            value = value * (batch["mask"].sum() / batch["expected"].sum())
        yield Loss("model", value, metrics)

    def validate(self) -> dict[str, float]:
        """Mean negative log-likelihood (nats a token), accuracy, and perplexity beside that of counting tokens and
        pairs, of held-out images in their first view. A masked model is asked for a fixed random set of hidden tokens,
        a random-order one in fixed random orders.
        """
        if not len(self._held_out):
            return {}
        sums, weight = {"nll": 0.0, "accuracy": 0.0}, 0.0
        for start in range(0, len(self._held_out), _VALIDATION_BATCH):
            images = self._held_out[start : start + _VALIDATION_BATCH]
            generator = torch.Generator().manual_seed(_MASK_SEED + start)
            batch = self._batch(images, np.full(len(images), self._views[0]), generator, training=False)
            count = float(batch["mask"].sum()) if "mask" in batch else float(batch["tokens"].numel())
            batch = {name: tensor.to(self.model.start.device) for name, tensor in batch.items()}
            _, metrics = self.modules["model"](**{name: batch.get(name) for name in _INPUTS})
            sums = {name: total + float(metrics[name]) * count for name, total in sums.items()}
            weight += count
        nll, accuracy = sums["nll"] / weight, sums["accuracy"] / weight
        return {"nll": nll, "accuracy": accuracy, "perplexity": _exp(nll), **self._baselines}

    def sample(self, step: Step) -> Image.Image | None:  # noqa: ARG002 - the image does not depend on it
        """Sixteen samples of seed 0: the classes in turn; for a decoder, from semantic tokens of held-out images."""
        numbers, c = range(_SAMPLES), self.model.config
        labels = torch.tensor([i % c.num_classes for i in numbers]) if c.num_classes else None
        prefix = None
        if self.data.prefix:
            source = self._held_out if len(self._held_out) else self._train
            prefix = self.cache.tokens(self.data.prefix, np.resize(source, _SAMPLES), int(self._views[0]))
        params = SamplingParams(order="raster" if self.auxiliary.order_annealing else "random")
        tokens = sample(self.model, numbers, 0, params, labels, prefix)  # (16, n)
        if self.data.target == "vq" and self.vqgan is not None:
            return image_grid([to_pil(image) for image in self.vqgan.decode(tokens).clamp(0, 1)])
        grid = self.cache.space(self.data.target).grid
        return image_grid([token_image(row, grid, c.vocab_size, 96) for row in tokens])

    def export(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        names = self.cache.classes if self.data.labels else []
        facts = {**provenance, "space": self.data.target, "class_names": names, "source": self.cache.info["source"]}
        save_component(folder, merged(self.model), self.model.config, facts)

    # -- batches

    def _batch(self, images: np.ndarray, views: np.ndarray, generator: torch.Generator, training: bool = True) -> Batch:
        batch = {"index": torch.from_numpy(images), "tokens": self.cache.tokens(self.data.target, images, views)}
        if self.data.prefix:
            batch["prefix"] = self.cache.tokens(self.data.prefix, images, views)
        if self.data.labels:
            labels = torch.from_numpy(self.cache.labels[images])
            batch["labels"] = self.model.drop_labels(labels, generator) if training else labels
        if self.model.config.role == "masked":
            batch["mask"] = random_masks(len(images), self.model.config.length, generator)
            batch["expected"] = batch["mask"].sum(1).float().mean().expand(len(images))  # (B,) masked places an image
        if self.model.config.role == "random" and (training or not self.auxiliary.order_annealing):
            batch["order"] = torch.rand(batch["tokens"].shape, generator=generator).argsort(1)
        if training:
            batch |= self.auxiliary.draw(batch, self.model.config.vocab_size, generator)
        return batch

    @cached_property
    def _baselines(self) -> dict[str, float]:
        """What counting the training tokens makes of the held-out ones, and the share of the vocabulary that occurs."""
        view = int(self._views[0])

        def parts(images: np.ndarray) -> Iterator[Tensor]:
            return (
                self.cache.tokens(self.data.target, images[i : i + 4096], view) for i in range(0, len(images), 4096)
            )

        counts = Counts(parts(self._train[:: math.ceil(len(self._train) / _COUNTED)]), self.model.config.vocab_size)
        held_out = torch.cat(list(parts(self._held_out)))
        return {
            "unigram_perplexity": _exp(counts.unigram_nll(held_out)),
            "bigram_perplexity": _exp(counts.bigram_nll(held_out)),
            "codebook_use": counts.use,
        }


def random_masks(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """MaskGIT's training masks (batch, length) bool, True where a token is hidden: floor(length * cos(pi u / 2) + 1)
    tokens, u uniform, at least one and at most all, at the lowest of random scores, as DAMO-NLP-SG/DiGIT at cd6d8ca has
    it.
    """
    u = torch.rand(batch, generator=generator)
    hidden = (length * torch.cos(math.pi * u / 2) + 1).floor().clamp(1, length)  # (B,)
    ranks = torch.rand(batch, length, generator=generator).argsort(1).argsort(1)  # (B, length)
    return ranks < hidden[:, None]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
