"""The feed-forward decoder (stage 2): semantic tokens to pixels, or to all VQ tokens, in a single pass.

The paper names its second autoregressive model as the weak spot of its design and asks for "direct pixel prediction
from the discrete tokens" (section 6). Here a transformer that looks both ways reads the semantic tokens, and a head
gives either

| ``head`` | the output |
|---|---|
| pixels | images, through a light convolutional network that doubles the side a few times |
| vq | logits of all VQ tokens at once, for the VQGAN's decoder |

Tokens do not say everything about an image: those of a self-supervised encoder hardly know its colours. What they
leave open is decided by a small vector of noise, one for each image (:func:`digit.sampling.rng.pixel_latents`).

Sources: Zheng et al. 2025, arXiv 2507.08441 (VFMTok: tokens of a foundation model, decoded in one pass); Zhu et al.
2017, arXiv 1711.11586 (BicycleGAN: a noise vector that means something); this project's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import NonNegativeInt, PositiveInt, Probability, config
from digit.core.errors import DigitError
from digit.models.component import Component
from digit.models.token_model import NO_LABEL, Labels
from digit.models.transformer import Transformer, TransformerConfig, init_weights
from digit.models.vqgan import ResidualBlock, held_channels
from digit.native.norm import channels_last, norm_silu


@config
class PixelHeadConfig:
    """From the transformer's states to pixels.

    Attributes:
        resolution: side of the images.
        widths: channels at the side of the token grid, then at twice that side, and so on.
        blocks: residual blocks a side.
        patch: pixels along a side that a place of the last, largest side becomes; 1 is one.
        groups: of the group norms; must divide every width.
        smoothing: the fixed filter behind patches; both take away what alternates from pixel to pixel. "flat" keeps
            3/4 of what repeats every four pixels, "binomial" (of the first edition) half of it.
    """

    resolution: PositiveInt = 32
    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 64, 32)
    blocks: PositiveInt = 1
    patch: PositiveInt = 1
    groups: PositiveInt = 8
    smoothing: Literal["binomial", "flat"] = "binomial"

    def __post_init__(self) -> None:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups={self.groups} does not divide every width {list(self.widths)}")

    @property
    def factor(self) -> int:
        """Pixels a semantic token spans along a side."""
        return self.patch << (len(self.widths) - 1)

    def activation_numbers(self) -> int:
        """Activations of the head for one image, where they are largest; see :meth:`VQGANConfig.activation_bytes`."""
        before = [self.widths[0], *self.widths[:-1]]
        sides = [self.resolution // self.factor << level for level in range(len(self.widths))]
        return max(held_channels(b, w) * s**2 for b, w, s in zip(before, self.widths, sides, strict=True))


@config
class FeedForwardConfig:
    """What a feed-forward decoder reads and gives. Names are those of
    :class:`~digit.models.token_model.TokenModelConfig`.

    Attributes:
        prefix_vocab_size: K, the semantic vocabulary.
        grid: (rows, columns) of the places of semantic tokens.
        codebook_depth: tokens a place, d, side by side, whose vectors are added; more than 1 with a residual codebook.
        pixels: shape of the head "pixels"; None for the head "vq".
        vocab_size: V, codes of the VQGAN, for the head "vq", one a place; 0 otherwise.
        noise_dim: length of the noise vector; 0 for a decoder that always gives the same image.
        local_noise: numbers that every place makes of the noise vector with weights of its own, so that equal tokens
            side by side need not become equal patches; 0 tells all places the same.
    """

    role: Literal["onepass"] = "onepass"
    prefix_vocab_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]
    codebook_depth: PositiveInt = 1
    head: Literal["pixels", "vq"] = "pixels"
    pixels: PixelHeadConfig | None = None
    vocab_size: NonNegativeInt = 0
    noise_dim: NonNegativeInt = 32
    local_noise: NonNegativeInt = 0
    num_classes: NonNegativeInt = 0
    class_dropout: Probability = 0.1
    transformer: TransformerConfig

    can_guide = False  # there is no unconditional half to push away from in one pass

    def __post_init__(self) -> None:
        if self.transformer.causal:
            raise ValueError("role 'onepass' needs transformer.causal = False")
        if (self.head == "pixels") != (self.pixels is not None) or (self.head == "vq") != (self.vocab_size > 0):
            raise ValueError(
                "head 'pixels' needs 'pixels' and no vocab_size; head 'vq' needs vocab_size and no 'pixels'"
            )
        if self.pixels is not None:
            sides = [side * self.pixels.factor for side in self.grid]
            if any(side != self.pixels.resolution for side in sides):
                raise ValueError(
                    f"a grid of {self.grid[0]} x {self.grid[1]} tokens becomes {sides[0]} x {sides[1]} pixels with "
                    f"{len(self.pixels.widths)} widths and patch={self.pixels.patch}, not "
                    f"resolution={self.pixels.resolution}"
                )

    @property
    def prefix_length(self) -> int:
        """Semantic tokens an image."""
        return self.length * self.codebook_depth

    @property
    def length(self) -> int:
        """Places N, and so VQ tokens an image for the head "vq"."""
        return self.grid[0] * self.grid[1]

    @property
    def resolution(self) -> int:
        """Side of the images, for the head "pixels"; 0 otherwise."""
        return self.pixels.resolution if self.pixels is not None else 0

    def describe(self) -> str:
        """Its shape in a line."""
        t, p = self.transformer, self.pixels
        made = f"{self.length} VQ tokens of {self.vocab_size:,}"
        if p is not None:
            patches = f" and patches of {p.patch}" if p.patch > 1 else ""
            made = f"{p.resolution} px through widths {list(p.widths)}{patches}"
        classes = f"; {self.num_classes:,} classes" if self.num_classes else ""
        return (
            f"in one pass, {t.describe()}; {made} from {self.prefix_length} of "
            f"{self.prefix_vocab_size:,}, noise of {self.noise_dim}{classes}"
        )


class PixelHead(nn.Module):
    """States and noise to images, nominally 0..1, not clamped.

    The noise reaches the head once more, as a gain and an offset of its last features: light and colours everywhere.
    """

    def __init__(self, dim: int, config: PixelHeadConfig, noise_dim: int) -> None:
        super().__init__()
        self.patch, self.smoothing = config.patch, config.smoothing
        self.levels = nn.ModuleList()  # smallest side first
        before = config.widths[0]
        self.conv_in = nn.Conv2d(dim, before, 1)
        for width in config.widths:
            inputs = [before] + [width] * (config.blocks - 1)
            self.levels.append(nn.ModuleList(ResidualBlock(w, width, config.groups) for w in inputs))
            before = width
        self.norm_out = nn.GroupNorm(config.groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3 * config.patch**2, 3, padding=1)
        # training begins near grey
        nn.init.normal_(self.conv_out.weight, std=0.01)
        nn.init.constant_(cast(Tensor, self.conv_out.bias), 0.5)
        self.style = nn.Linear(noise_dim, 2 * before, bias=False) if noise_dim else None
        if self.style is not None:
            nn.init.normal_(self.style.weight, std=0.1 * noise_dim**-0.5)

    def forward(
        self, x: Float[Tensor, "B D rows columns"], noise: Float[Tensor, "B noise_dim"] | None = None
    ) -> Float[Tensor, "B 3 S S"]:
        """Decode; each level after the first works at twice the side of the one before."""
        # channels last is the layout in which CPU and GPU convolve fastest
        x = self.conv_in(channels_last(x))
        for index, level in enumerate(self.levels):
            for number, block in enumerate(cast(nn.ModuleList, level)):
                x = block(x, doubled=bool(index) and not number)  # the first block of each further level doubles
        gain = offset = None
        if noise is not None and self.style is not None:
            gain, offset = self.style(noise).chunk(2, 1)  # (B, C) each
        images = F.pixel_shuffle(self.conv_out(norm_silu(self.norm_out, x, gain, offset)), self.patch)
        return _smooth(images, _FILTERS[self.smoothing]) if self.patch > 1 else images


_FILTERS = {
    "binomial": (1 / 4, 2 / 4, 1 / 4),
    # 1 - (1 - b)^2 of the binomial one's response b: flat to the third order at frequency 0, 0 at the highest
    "flat": (-1 / 16, 4 / 16, 10 / 16, 4 / 16, -1 / 16),
}


def _smooth(images: Tensor, filter_: Sequence[float]) -> Tensor:
    """Images (B, 3, S, S) without what alternates from pixel to pixel, by a filter (2 n + 1,) in both directions.

    The pixels of a patch come from filters of their own, and discriminators that halve the side can be pleased by such
    a pattern; a fixed filter behind the shuffle makes it impossible (Sugawara et al. 2018, arXiv 1806.02658).
    """
    row, border = images.new_tensor(filter_), len(filter_) // 2
    kernel = (row[:, None] * row).expand(3, 1, -1, -1)
    return F.conv2d(F.pad(images, (border,) * 4, mode="replicate"), kernel, groups=3)


class FeedForwardDecoder(Component):
    """Embeddings, a transformer that looks both ways, and the head."""

    config_class = FeedForwardConfig
    saved_as = "OnePassDecoder"
    config: FeedForwardConfig

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__(config)
        dim = config.transformer.dim
        self.token_embedding = nn.Embedding(config.prefix_vocab_size, dim)
        self.position_embedding = nn.Embedding(config.length, dim)
        self.start = nn.Parameter(torch.zeros(dim))  # added everywhere where there is no class
        self.class_embedding = nn.Embedding(config.num_classes, dim) if config.num_classes else None
        self.noise_embedding = nn.Linear(config.noise_dim, dim, bias=False) if config.noise_dim else None
        self.places = self.place_embedding = None
        if config.noise_dim and config.local_noise:
            self.places = nn.Linear(config.noise_dim, config.length * config.local_noise, bias=False)
            self.place_embedding = nn.Linear(config.local_noise, dim, bias=False)
        self.transformer = Transformer(config.transformer)
        init_weights(self)
        if self.noise_embedding is not None:  # as loud as a token
            nn.init.normal_(self.noise_embedding.weight, std=0.02 * config.noise_dim**-0.5)
        if self.places is not None and self.place_embedding is not None:
            nn.init.normal_(self.places.weight, std=config.noise_dim**-0.5)
            nn.init.normal_(self.place_embedding.weight, std=0.02 * config.local_noise**-0.5)
        if config.pixels is not None:
            self.head: nn.Module = PixelHead(dim, config.pixels, config.noise_dim)
        else:
            self.head = nn.Linear(dim, config.vocab_size, bias=False)
            init_weights(self.head)

    def forward(
        self, tokens: Int[Tensor, "B n"], noise: Float[Tensor, "B noise_dim"] | None = None, labels: Labels = None
    ) -> Float[Tensor, "B ..."]:
        """Decode semantic tokens to images (B, 3, S, S), nominally 0..1, not clamped; with the head "vq", to logits (B,
        N, V).

        The noise is standard normal; None is zeros, the middle of all images. A DigitError for another number of
        tokens, or labels where no classes are known.
        """
        x = self._embed(tokens, noise, labels)
        if not self.training and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the sums too: a fifth of the time went into copies
        x = self.transformer(x)  # (B, N, D)
        if self.config.pixels is None:
            logits: Tensor = self.head(x)
            return logits
        images: Tensor = self.head(x.transpose(1, 2).unflatten(2, self.config.grid), noise)
        return images

    def drop_labels(self, labels: Int[Tensor, " B"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Hide the labels whose number in [0, 1) is below ``class_dropout``."""
        return torch.where(uniform < self.config.class_dropout, torch.full_like(labels, NO_LABEL), labels)

    def _embed(self, tokens: Tensor, noise: Tensor | None, labels: Tensor | None) -> Tensor:
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] != c.prefix_length:
            raise DigitError(
                f"Tokens {tuple(tokens.shape)} were given; this decoder reads (B, {c.prefix_length}) semantic tokens."
            )
        everywhere = self.start.expand(len(tokens), -1)  # (B, D)
        if labels is not None:
            if self.class_embedding is not None:
                everywhere = torch.where((labels >= 0)[:, None], self.class_embedding(labels.clamp(min=0)), everywhere)
            elif bool((labels >= 0).any()):
                raise DigitError("Class labels were given to a feed-forward decoder without classes; leave them out.")
        if noise is not None and self.noise_embedding is not None:
            everywhere = everywhere + self.noise_embedding(noise)
        x: Tensor = self.token_embedding(tokens).unflatten(1, (c.length, c.codebook_depth)).sum(2)  # (B, N, D)
        x = x + self.position_embedding.weight + everywhere[:, None]
        if noise is not None and self.places is not None and self.place_embedding is not None:
            x = x + self.place_embedding(self.places(noise).unflatten(1, (c.length, c.local_noise)))  # (B, N, D)
        return x


OnePassConfig, OnePassDecoder = FeedForwardConfig, FeedForwardDecoder  # names of the first edition
