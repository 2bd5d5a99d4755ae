"""VQGAN: images to a grid of VQ tokens and back.

The architecture is that of MAGE's VQGAN (the paper's, 256 px to 16 x 16 of 1,024 codes): convolutions only, no
attention, images in 0..1. Small configs of the same network serve small images.

Sources: [0] Esser et al. 2021, arXiv 2012.09841. [1] Li et al. 2023, arXiv 2211.09117 (MAGE), whose weights fix the
details: average pooling down, nearest-neighbour up, bias-free convolutions in the residual blocks, and a shortcut over
the *hidden* features where the width changes. [2] Yu et al. 2022, arXiv 2110.04627 (ViT-VQGAN), section 3.2.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.core.errors import DigitError
from digit.models.codebook import nearest
from digit.models.component import Component
from digit.native.norm import arranged, norm_silu


@config
class VQGANConfig:
    """Shape of a VQGAN.

    Attributes:
        resolution: side of the images.
        channels: width at full resolution.
        multipliers: width factor per level; each level after the first halves the side.
        blocks: residual blocks a level.
        codes: entries V of the codebook.
        code_dim: their width.
        normalize_codes: latents and codes are unit vectors, so the nearest code is the one of the largest cosine [2].
        groups: of the group norms; must divide every width.
        shortcut: where a block changes width, what its 1x1 shortcut reads: "hidden" (as MAGE's weights need) or "input"
            (the usual).
    """

    resolution: PositiveInt = 256
    channels: PositiveInt = 128
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    blocks: PositiveInt = 2
    codes: PositiveInt = 1024
    code_dim: PositiveInt = 256
    normalize_codes: bool = False
    groups: PositiveInt = 32
    shortcut: Literal["hidden", "input"] = "input"

    def __post_init__(self) -> None:
        if self.resolution % self.factor:
            raise ValueError(
                f"resolution={self.resolution} is not a multiple of {self.factor}, the total down-sampling"
            )
        if any(self.channels * m % self.groups for m in self.multipliers):
            raise ValueError(
                f"groups={self.groups} does not divide every width {[self.channels * m for m in self.multipliers]}"
            )

    @property
    def factor(self) -> int:
        """Pixels a token spans along a side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the token grid."""
        side = self.resolution // self.factor
        return side, side

    def describe(self) -> str:
        """Its shape in a line."""
        rows, columns = self.grid
        shape = f"width {self.channels} x {list(self.multipliers)}"
        return f"{self.resolution} px to {rows} x {columns} of {self.codes:,} codes; {shape}"

    def activation_bytes(self) -> int:
        """Float32 activations of the decoder for one image, in bytes, where they are largest, without workspaces."""
        widths = [self.channels * m for m in self.multipliers]
        before = [*widths[1:], widths[-1]]  # what comes up from the coarser level
        sides = [self.resolution >> level for level in range(len(widths))]
        return 4 * max(held_channels(b, w) * s**2 for b, w, s in zip(before, widths, sides, strict=True))


def held_channels(before: int, width: int) -> int:
    """How many channels a residual block holds at a time: of one width its input, and what the running layer reads and
    writes; else its input twice and the hidden features, or these, the input, the shortcut and their sum.
    """
    return 3 * width if before == width else max(2 * before + width, before + 3 * width)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, and a shortcut; ``shortcut`` is that of :class:`VQGANConfig`."""

    def __init__(self, width_in: int, width: int, groups: int, shortcut: str = "input") -> None:
        super().__init__()
        self.shortcut_input = shortcut == "input"
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if width_in != width:
            self.shortcut = nn.Conv2d(width_in if self.shortcut_input else width, width, 1, bias=False)

    def forward(self, x: Float[Tensor, "B C H W"], doubled: bool = False) -> Float[Tensor, "B C2 H2 W2"]:
        """``doubled``: as if x came at twice the side, every place as 2 x 2 of it.

        Norm, activation and a 1x1 shortcut of such an x are those of the small one, doubled, at a quarter of the work.
        """
        grow = _doubled if doubled else nn.Identity()
        h: Tensor = self.conv2(norm_silu(self.norm2, self.conv1(grow(norm_silu(self.norm1, x)))))
        if self.shortcut is None:
            return grow(x) + h
        short: Tensor = grow(self.shortcut(x)) if self.shortcut_input else self.shortcut(h)
        return h + short


def _doubled(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, 2 H, 2 W): each place four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Encoder(nn.Module):
    """Images (B, 3, S, S) to latents (B, code_dim, S / factor, S / factor)."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList()
        before = config.channels
        for width in widths:
            inputs = [before] + [width] * (config.blocks - 1)
            self.levels.append(nn.ModuleList(ResidualBlock(w, width, config.groups, config.shortcut) for w in inputs))
            before = width
        self.middle = nn.ModuleList(ResidualBlock(before, before, config.groups, config.shortcut) for _ in range(2))
        self.norm_out = nn.GroupNorm(config.groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, config.code_dim, 1)

    def forward(self, x: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D h w"]:
        """Encode; each level after the first works at half the side of the one before."""
        x = self.conv_in(x)
        for index, level in enumerate(self.levels):
            if index:
                x = F.avg_pool2d(x, 2)  # (B, C, H / 2, W / 2)
            for block in cast(nn.ModuleList, level):
                x = block(x)
        for block in self.middle:
            x = block(x)
        out: Tensor = self.conv_out(norm_silu(self.norm_out, x))
        return out


class Decoder(nn.Module):
    """Latents (B, code_dim, h, w) to images (B, 3, h * factor, w * factor), not clamped."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.code_dim, before, 3, padding=1)
        self.middle = nn.ModuleList(ResidualBlock(before, before, config.groups, config.shortcut) for _ in range(2))
        self.levels = nn.ModuleList()  # coarsest first
        self.upsample = nn.ModuleList()  # upsample[i] follows levels[i]
        for width in reversed(widths):
            inputs = [before] + [width] * (config.blocks - 1)
            self.levels.append(nn.ModuleList(ResidualBlock(w, width, config.groups, config.shortcut) for w in inputs))
            before = width
            if len(self.upsample) < len(widths) - 1:
                self.upsample.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out = nn.GroupNorm(config.groups, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "B D h w"]) -> Float[Tensor, "B 3 S S"]:
        """Decode."""
        x = self.conv_in(arranged(z, self.norm_out))
        for block in self.middle:
            x = block(x)
        for index, level in enumerate(self.levels):
            for block in cast(nn.ModuleList, level):
                x = block(x)
            if index < len(self.upsample):
                x = self.upsample[index](_doubled(x))  # (B, C, 2 H, 2 W)
        out: Tensor = self.conv_out(norm_silu(self.norm_out, x))
        return out


class VQGAN(Component):
    """Encoder, codebook and decoder. Tokens are ids 0..V-1, row by row."""

    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        codes = nn.init.normal_(torch.empty(config.codes, config.code_dim))
        self.codebook = nn.Parameter(F.normalize(codes, dim=-1) if config.normalize_codes else codes)

    @property
    def num_tokens(self) -> int:
        """Tokens an image, M."""
        return self.config.grid[0] * self.config.grid[1]

    def latents(self, images: Tensor) -> Float[Tensor, "B M D"]:
        """Images (B, 3, S, S) in 0..1 to continuous latents; a DigitError for another image size than the config's."""
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise DigitError(f"The VQGAN takes images (B, 3, {size}, {size}); {tuple(images.shape)} was given.")
        latents: Tensor = self.encoder(images).flatten(2).transpose(1, 2)  # (B, M, code_dim)
        return F.normalize(latents, dim=-1) if self.config.normalize_codes else latents

    def encode(self, images: Tensor) -> Int[Tensor, "B M"]:
        """Images (B, 3, S, S) in 0..1 to VQ tokens: the nearest code, the lowest id on ties."""
        return nearest(self.latents(images), self.codebook)

    def decode_latents(self, latents: Float[Tensor, "B M D"]) -> Float[Tensor, "B 3 S S"]:
        """Latents to images, nominally 0..1, not clamped."""
        rows, columns = self.config.grid
        images: Tensor = self.decoder(latents.transpose(1, 2).reshape(len(latents), -1, rows, columns))
        return images

    def decode(self, tokens: Tensor) -> Float[Tensor, "B 3 S S"]:
        """VQ tokens (B, M) to images, nominally 0..1, not clamped; a DigitError for another number of tokens."""
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise DigitError(f"The VQGAN decodes (B, {self.num_tokens}) tokens; {tuple(tokens.shape)} was given.")
        return self.decode_latents(F.embedding(tokens, self.codebook))
