"""The second stage: from what the prior predicts to pixels, one interface for every kind of decoder.

| kind | class | way |
|---|---|---|
| none: the prior predicts VQ tokens | :class:`Stage2` | VQ tokens, VQGAN |
| ar, masked, onepass with the head "vq" | :class:`TokenDecoder` | semantic tokens, VQ tokens, VQGAN |
| onepass, head "pixels" | :class:`PixelDecoder` | semantic tokens and noise, pixels |
| rae | :class:`CentroidDecoder` | semantic tokens, their centroids, pixels |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from digit.core.errors import DigitError
from digit.pipeline.tokens import PixelLatents, Tokens
from digit.sampling.request import Sampled, SampleRequest
from digit.sampling.rng import pixel_latents
from digit.sampling.sampler import sample

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline

FITTED = 16
"""Noise vectors that are tried for an edited image, to meet the colours of the pixels that are kept."""

Callback = Callable[[str, int, Tensor], None]
"""Told (stage, done, tokens (B, length)) while sampling, stage being "prior" or the decoder's kind: after each token,
or after each step of a model that takes steps, where open tokens are -1. It may raise to stop.
"""

Kept = tuple[Float[Tensor, "B 3 S S"], Bool[Tensor, "B M"]]
"""Images of which cells are kept, and True for the cells to make anew."""


class Stage2:
    """From the prior's tokens to pixels; by itself for a baseline in VQ space, whose tokens the VQGAN decodes.

    Attributes:
        kind: of decoder, as users name it; None for a baseline.
        config: of the decoder's network; None where there is none.
    """

    kind: Any
    config: Any = None

    def __init__(self, pipe: DigitPipeline, kind: str | None = None) -> None:
        self.pipe, self.kind = pipe, kind

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the cells in which editing keeps pixels or makes them anew."""
        rows, columns = self.pipe.part("vqgan").config.grid
        return rows, columns

    def check_parts(self) -> None:
        """Raise a DigitError if a part is missing that pixels need."""
        self.pipe.part("vqgan")

    def sample(
        self, first: Tensor, request: SampleRequest, _callback: Callback | None = None, _kept: Kept | None = None
    ) -> Tokens:
        """The prior's tokens (B, N) to all that pixels are made of; what is kept stays as it is."""
        return Tokens(vq=first, labels=request.labels)  # the prior has kept what stays

    def pixels(self, tokens: Tokens) -> Float[Tensor, "B 3 S S"]:
        """What :meth:`sample` gave to images, nominally 0..1."""
        vqgan = self.pipe.part("vqgan")
        assert tokens.vq is not None
        vq = checked(tokens.vq, vqgan.num_tokens, vqgan.config.codes, "VQ")
        pixels: Tensor = vqgan.decode(vq.to(self.pipe.device))
        return pixels


class TokenDecoder(Stage2):
    """Semantic tokens to VQ tokens, and through the VQGAN."""

    def __init__(self, pipe: DigitPipeline, kind: str) -> None:
        super().__init__(pipe, kind)
        self.model: Any = pipe.decoders[kind]
        self.config = self.model.config
        self.like: Tensor = next(self.model.parameters())  # of the device and number format in which it computes

    def sample(
        self, first: Tensor, request: SampleRequest, callback: Callback | None = None, kept: Kept | None = None
    ) -> Tokens:
        """All VQ tokens, or those of free cells."""
        semantic, params = self.semantic(first), request.params[self.kind]
        given, free = (None, None) if kept is None else (self.pipe.part("vqgan").encode(kept[0]), kept[1])
        labels, told = self.known(request.labels), for_stage(self.kind, callback)
        vq = sample(self.model, request.images, request.seed, params, labels, semantic, given, free, told)
        return Tokens(semantic, vq, labels=request.labels)

    def semantic(self, first: Tensor) -> Int[Tensor, "B N"]:
        """The prior's tokens, checked and on the model's device."""
        found = checked(first, self.config.prefix_length, self.config.prefix_vocab_size, "semantic")
        return found.to(self.pipe.device)

    def known(self, labels: Tensor | None) -> Tensor | None:
        """The labels, for a decoder that knows classes."""
        return labels if self.config.num_classes else None


class PixelDecoder(TokenDecoder):
    """Semantic tokens and the noise of each image to pixels, in one pass and without a VQGAN."""

    fitted = FITTED

    @property
    def grid(self) -> tuple[int, int]:
        """That of the semantic tokens: there are no others."""
        rows, columns = self.config.grid
        return rows, columns

    def check_parts(self) -> None:
        """It needs nothing else."""

    def sample(
        self, first: Tensor, request: SampleRequest, _callback: Callback | None = None, kept: Kept | None = None
    ) -> Tokens:
        """The noise of each image; its standard deviation is the decoder's temperature.

        Of an edited image the pixels outside of free cells stay, and the noise is the one that suits them best.
        """
        noise = self.noise(request, request.params[self.kind].temperature)
        tokens = Tokens(self.semantic(first), None, PixelLatents(self.kind, noise), request.labels)
        if kept is None or bool(kept[1].all()):
            return tokens
        images, free = kept
        given = self.pipe.tokenizer.encode(images)
        side = self.config.resolution
        if images.shape[-1] != side:  # the decoder enlarges
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        cells = free.view(-1, 1, *self.grid).float()  # (B, 1, rows, columns)
        anew = F.interpolate(cells, images.shape[-2:], mode="nearest") > 0  # (B, 1, S, S)
        tries = [self.noise(request, stage=f"onepass-{i}").to(self.like) for i in range(self.fitted)]
        errors = []
        for noise in tries:
            rebuilt = self.pipe.to_pixels(Tokens(given, None, PixelLatents(self.kind, noise), tokens.labels))
            errors.append(((rebuilt - images).square() * ~anew).sum((1, 2, 3)))  # (B,)
        best = torch.stack(errors).argmin(0)  # (B,)
        noise = torch.stack(tries)[best, torch.arange(len(images), device=best.device)]  # (B, noise_dim)
        return replace(tokens, latents=PixelLatents(self.kind, noise, images, anew))

    def noise(self, request: SampleRequest, temperature: float = 1.0, stage: str = "onepass") -> Tensor:
        """That of each image (B, noise_dim)."""
        return pixel_latents(self.config, request.images, request.seed, temperature, stage)

    def pixels(self, tokens: Tokens) -> Float[Tensor, "B 3 S S"]:
        """One pass."""
        latents, labels = tokens.latents, self.known(tokens.labels)
        assert tokens.semantic is not None
        assert latents is not None
        labels = None if labels is None else labels.to(self.pipe.device)
        made: Tensor = self.model(self.semantic(tokens.semantic), latents.noise.to(self.like), labels)
        made = made.float().clamp(0, 1)
        if latents.kept is None or latents.anew is None:
            return made
        return torch.where(latents.anew.to(made.device), made, latents.kept.to(made.device))


class CentroidDecoder(PixelDecoder):
    """Semantic tokens to pixels through their centroids, without noise; see :mod:`digit.models.rae`."""

    fitted = 1

    def noise(self, request: SampleRequest, _temperature: float = 1.0, stage: str = "") -> Tensor:  # noqa: ARG002
        """None: (B, 0)."""
        return torch.zeros(len(request), 0)


STAGES: dict[str, type[TokenDecoder]] = {"vq": TokenDecoder, "pixels": PixelDecoder, "features": CentroidDecoder}
"""By what the decoder's head gives, or reads."""


def checked(tokens: Tensor, length: int, vocab: int, kind: str) -> Int[Tensor, "B length"]:
    """The tokens, if they are (B, length) ids below ``vocab``. DigitError: another shape, no integers, or ids out of
    range.
    """
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise DigitError(f"{kind} tokens of shape {tuple(tokens.shape)} were given; this model takes (B, {length}).")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        name = str(tokens.dtype).removeprefix("torch.")
        raise DigitError(f"{kind} tokens of type {name} were given; expected integers from 0 to {vocab - 1}.")
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
        raise DigitError(
            f"{kind} tokens range from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {vocab - 1}."
        )
    return tokens.long()


def for_stage(stage: str, callback: Callback | None) -> Sampled | None:
    """A sampler's callback that tells ``callback`` the stage too."""

    def tell(done: int, tokens: Tensor, masked: Tensor | None = None) -> None:
        assert callback is not None
        callback(stage, done, tokens if masked is None else tokens.masked_fill(masked, -1))

    return None if callback is None else tell
