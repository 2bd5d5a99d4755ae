"""The second stage: from what the prior predicts to pixels, one interface for every kind of decoder.

| kind | class | way |
|---|---|---|
| ar, masked | :class:`TokenDecoder` | semantic tokens, VQ tokens one by one or in a few steps, VQGAN |
| onepass, head "vq" | :class:`FeedForwardTokens` | semantic tokens, all VQ tokens at once, VQGAN |
| onepass, head "pixels" | :class:`FeedForwardPixels` | semantic tokens and noise, pixels |
| none: the prior predicts VQ tokens | :class:`VQBaseline` | VQ tokens, VQGAN |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from digit.core.errors import DigitError
from digit.models.feedforward import FeedForwardDecoder, PixelHeadConfig
from digit.models.token_model import TokenModel
from digit.pipeline.tokens import PixelLatents, Tokens
from digit.sampling.engine import sample
from digit.sampling.feedforward import pixel_latents, sample_feedforward
from digit.sampling.request import SampleRequest
from digit.sampling.rng import uniforms

if TYPE_CHECKING:
    from digit.pipeline.pipeline import DigitPipeline

FITTED = 16
"""Noise vectors that are tried for an edited image, to meet the colours of the pixels that are kept."""

Callback = Callable[[str, int, Tensor], None]
"""Told (stage, done, tokens (B, length)) while sampling, stage being "prior" or the decoder's kind: after each token, or
after each step of a masked decoder, whose open tokens are -1. It may raise to stop."""


class Stage2(Protocol):
    """From the prior's tokens to pixels.

    Attributes:
        kind: of decoder, as users name it; None for a baseline in VQ space.
        config: of the decoder's network; None where there is none.
    """

    kind: str | None
    config: Any

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the cells in which editing keeps pixels or makes them anew."""
        ...

    def check_parts(self) -> None:
        """Raise a DigitError if a part is missing that pixels need."""
        ...

    def sample(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """The prior's tokens (B, N) to all that pixels are made of."""
        ...

    def edit(
        self, first: Tensor, request: SampleRequest, images: Tensor, free: Tensor, callback: Callback | None = None
    ) -> Tokens:
        """As :meth:`sample`, keeping of the images (B, 3, S, S) the cells (B, rows * columns) that are not free."""
        ...

    def pixels(self, tokens: Tokens) -> Tensor:
        """What :meth:`sample` gave to images (B, 3, S, S), nominally 0..1."""
        ...


class VQBaseline(Stage2):
    """The prior's tokens are VQ tokens, which the VQGAN decodes."""

    def __init__(self, pipe: DigitPipeline, kind: str | None = None) -> None:
        self.pipe, self.kind, self.config = pipe, kind, cast(Any, None)

    @property
    @override
    def grid(self) -> tuple[int, int]:
        """That of the VQ tokens."""
        grid: tuple[int, int] = self.pipe.part("vqgan").config.grid
        return grid

    @override
    def check_parts(self) -> None:
        """It needs the VQGAN."""
        self.pipe.part("vqgan")

    @override
    def sample(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """Nothing is left to sample."""
        return Tokens(vq=first, labels=request.labels)

    @override
    def edit(
        self, first: Tensor, request: SampleRequest, images: Tensor, free: Tensor, callback: Callback | None = None
    ) -> Tokens:
        """The prior has kept what stays."""
        return self.sample(first, request)

    @override
    def pixels(self, tokens: Tokens) -> Tensor:
        """Through the VQGAN."""
        vqgan = self.pipe.part("vqgan")
        assert tokens.vq is not None
        pixels: Tensor = vqgan.decode(
            checked(tokens.vq, vqgan.num_tokens, vqgan.config.codes, "VQ").to(self.pipe.device)
        )
        return pixels


class TokenDecoder(VQBaseline):
    """Semantic tokens to VQ tokens by an AR or a masked decoder, and through the VQGAN."""

    def __init__(self, pipe: DigitPipeline, kind: str) -> None:
        super().__init__(pipe, kind)
        self.model: Any = pipe.decoders[kind]
        self.config = self.model.config

    @override
    def sample(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """All VQ tokens."""
        return self._tokens(first, request, callback)

    @override
    def edit(
        self, first: Tensor, request: SampleRequest, images: Tensor, free: Tensor, callback: Callback | None = None
    ) -> Tokens:
        """The VQ tokens of free cells."""
        return self._tokens(first, request, callback, self.pipe.part("vqgan").encode(images), free)

    def _tokens(self, first: Tensor, request: SampleRequest, callback: Callback | None, *kept: Tensor) -> Tokens:
        semantic = self.semantic(first)
        told = for_stage(cast(str, self.kind), callback)
        return Tokens(semantic, self.draw(semantic, request, told, *kept), labels=request.labels)

    def draw(
        self,
        semantic: Tensor,
        request: SampleRequest,
        callback: Callable[..., None] | None,
        given: Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        """VQ tokens (B, M); those of ``given`` (B, M) stay where ``free`` (B, M) is False."""
        model: TokenModel = self.model
        params, labels = request.params[cast(str, self.kind)], self.known(request.labels)
        return sample(model, request.images, request.seed, params, labels, semantic, given, free, callback)

    def semantic(self, first: Tensor) -> Tensor:
        """The prior's tokens, checked and on the model's device."""
        found = checked(first, self.config.prefix_length, self.config.prefix_vocab_size, "semantic")
        return found.to(self.pipe.device)

    def known(self, labels: Tensor | None) -> Tensor | None:
        """The labels, for a decoder that knows classes."""
        return labels if self.config.num_classes else None


class FeedForwardTokens(TokenDecoder):
    """Semantic tokens to all VQ tokens in one pass, and through the VQGAN."""

    @override
    def draw(
        self,
        semantic: Tensor,
        request: SampleRequest,
        callback: Callable[..., None] | None,
        given: Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        """VQ tokens (B, M)."""
        model: FeedForwardDecoder = self.model
        # the noise takes the numbers of the stage; the draw of the tokens has its own
        uniform = uniforms(request.seed, request.images, "onepass-tokens", (model.config.length,))
        noise, labels = pixel_latents(model.config, request.images, request.seed), self.known(request.labels)
        device, params = model.start.device, request.params[cast(str, self.kind)]
        labels, given, free = (None if part is None else part.to(device) for part in (labels, given, free))
        vq = sample_feedforward(model, uniform.to(device), noise, params, semantic, labels, given, free)
        if callback is not None:
            callback(model.config.length, vq)
        return vq


class FeedForwardPixels(TokenDecoder):
    """Semantic tokens and the noise of each image to pixels, in one pass and without a VQGAN."""

    @property
    @override
    def grid(self) -> tuple[int, int]:
        """That of the semantic tokens: there are no others."""
        grid: tuple[int, int] = self.config.grid
        return grid

    @override
    def check_parts(self) -> None:
        """It needs nothing else."""

    @override
    def sample(self, first: Tensor, request: SampleRequest, callback: Callback | None = None) -> Tokens:
        """The noise of each image; its standard deviation is the decoder's temperature."""
        kind = cast(str, self.kind)
        noise = pixel_latents(self.config, request.images, request.seed, request.params[kind].temperature)
        return Tokens(self.semantic(first), None, PixelLatents(kind, noise), request.labels)

    @override
    def edit(
        self, first: Tensor, request: SampleRequest, images: Tensor, free: Tensor, callback: Callback | None = None
    ) -> Tokens:
        """Pixels outside of free cells stay, and the noise is the one that suits their colours best."""
        tokens = self.sample(first, request)
        if bool(free.all()):
            return tokens
        given = self.pipe.tokenizer.encode(images)
        side = cast(PixelHeadConfig, self.config.pixels).resolution
        if images.shape[-1] != side:  # the decoder enlarges
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        cells = free.view(-1, 1, *self.grid).float()  # (B, 1, rows, columns)
        anew = F.interpolate(cells, images.shape[-2:], mode="nearest") > 0  # (B, 1, S, S)
        tries = [
            pixel_latents(self.config, request.images, request.seed, stage=f"onepass-{i}").to(self.model.start)
            for i in range(FITTED)
        ]
        errors = []
        for noise in tries:
            rebuilt = self.pipe.to_pixels(Tokens(given, None, PixelLatents(cast(str, self.kind), noise), tokens.labels))
            errors.append(((rebuilt - images).square() * ~anew).sum((1, 2, 3)))  # (B,)
        best = torch.stack(errors).argmin(0)  # (B,)
        noise = torch.stack(tries)[best, torch.arange(len(images), device=best.device)]  # (B, noise_dim)
        return replace(tokens, latents=PixelLatents(cast(str, self.kind), noise, images, anew))

    @override
    def pixels(self, tokens: Tokens) -> Tensor:
        """One pass."""
        latents, model = tokens.latents, self.model
        assert tokens.semantic is not None
        assert latents is not None
        labels = self.known(tokens.labels)
        labels = None if labels is None else labels.to(self.pipe.device)
        pixels: Tensor = (
            model(self.semantic(tokens.semantic), latents.noise.to(model.start), labels).float().clamp(0, 1)
        )
        if latents.kept is None or latents.anew is None:
            return pixels
        return torch.where(latents.anew.to(pixels.device), pixels, latents.kept.to(pixels.device))


STAGES: dict[tuple[str, str], Callable[[Any, str], Stage2]] = {
    ("ar", "vq"): TokenDecoder,
    ("masked", "vq"): TokenDecoder,
    ("onepass", "vq"): FeedForwardTokens,
    ("onepass", "pixels"): FeedForwardPixels,
}
"""By the decoder's role and what its head gives."""


def checked(tokens: Tensor, length: int, vocab: int, kind: str) -> Tensor:
    """Tokens (B, length) of ids below ``vocab``.

    Raises:
        DigitError: another shape, or ids out of range.
    """
    if tokens.ndim != 2 or tokens.shape[1] != length:
        raise DigitError(f"{kind} tokens of shape {tuple(tokens.shape)} were given; this model takes (B, {length}).")
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab):
        raise DigitError(
            f"{kind} tokens range from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {vocab - 1}."
        )
    return tokens


def for_stage(stage: str, callback: Callback | None) -> Callable[..., None] | None:
    """A sampler's callback that tells ``callback`` the stage too."""

    def tell(done: int, tokens: Tensor, masked: Tensor | None = None) -> None:
        assert callback is not None
        callback(stage, done, tokens if masked is None else tokens.masked_fill(masked, -1))

    return None if callback is None else tell
