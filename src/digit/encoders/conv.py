"""A small residual convolutional encoder for small images: quick to train on a CPU where a ViT is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.core.errors import DigitError
from digit.encoders.base import Combine, Preprocessing, as_written, combined
from digit.models.component import Component


@config
class ConvEncoderConfig:
    """Shape of a convolutional encoder.

    Attributes:
        widths: channels a level; each level after the first halves the side.
        blocks: residual blocks a level.
        norm: "batch", or "group" (8 channels a group), which does not depend on the batch in training.
        layers: several blocks whose outputs are taken instead, counted from the end, such as (-2, -1). Each is averaged
            over the places of the last block and layer-normed.
        combine: how they become one feature: "sum", "mean", or "concat", in the order given.
        preprocessing: from images to what the network sees.
    """

    widths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 96, 192)
    blocks: tuple[PositiveInt, ...] = (1, 1, 2)
    norm: Literal["batch", "group"] = "batch"
    layers: tuple[int, ...] = ()
    combine: Combine = "sum"
    preprocessing: Preprocessing = Preprocessing(image_size=32)

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.widths):
            raise DigitError(f"blocks={self.blocks} and widths={self.widths} must have one entry for each level.")
        if self.norm == "group" and any(width % 8 for width in self.widths):
            raise DigitError(f"norm='group' needs widths that are multiples of 8; widths={self.widths} was given.")
        if self.preprocessing.seen % self.factor:
            raise DigitError(
                f"The side that the network sees, {self.preprocessing.seen}, is not a multiple of {self.factor}."
            )

        outside = [layer for layer in self.layers if not -sum(self.blocks) <= layer < 0]
        if outside:
            raise DigitError(f"layers={self.layers}: the network has blocks -{sum(self.blocks)} to -1.")
        if self.combine != "concat" and len(set(self.taken.values())) > 1:
            raise DigitError(f"combine='{self.combine}' needs blocks of one width, not {self.taken}: use concat.")

    @model_serializer(mode="wrap")
    def _plain(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return as_written(fields(self))

    @property
    def block_widths(self) -> list[int]:
        """Channels of the output of each block."""
        return [width for width, count in zip(self.widths, self.blocks, strict=True) for _ in range(count)]

    @property
    def taken(self) -> dict[int, int]:
        """The width of each block whose output is taken."""
        return {layer: self.block_widths[layer] for layer in self.layers or (-1,)}

    @property
    def factor(self) -> int:
        """Pixels a feature spans along a side."""
        return 1 << (len(self.widths) - 1)

    def describe(self) -> str:
        """Its shape in a line."""
        return f"convolutional; {self.preprocessing.describe()}"


class _Block(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, and a shortcut. The first convolution may halve the side."""

    def __init__(self, width_in: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width_in, norm), _norm(width, norm)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(width_in, width, 1, stride=stride, bias=False) if width_in != width or stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) to (B, width, H / stride, W / stride)."""
        h = F.relu(self.norm1(x))
        short: Tensor = x if self.shortcut is None else self.shortcut(h)
        out: Tensor = short + self.conv2(F.relu(self.norm2(self.conv1(h))))
        return out


def _norm(width: int, kind: str) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(width // 8, width)


class ConvEncoder(Component):
    """Images to a grid of features, as the patch features of a ViT: N positions of width D, layer-normed."""

    config_class = ConvEncoderConfig
    config: ConvEncoderConfig

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__(config)
        self.preprocessing = config.preprocessing
        widths = config.taken.values()
        self.dim = sum(widths) if config.combine == "concat" else max(widths)
        side = self.preprocessing.seen // config.factor
        self.grid: tuple[int, int] = (side, side)
        self.stem = nn.Conv2d(3, config.widths[0], 3, padding=1, bias=False)
        blocks, before = [], config.widths[0]
        for level, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            for index in range(count):
                blocks.append(_Block(before, width, 2 if level and not index else 1, config.norm))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(before)

    def taking(self, **changes: Any) -> ConvEncoder:
        """The same frozen network with other ``layers``, or another way to ``combine`` them."""
        if not changes:
            return self
        other = ConvEncoder(replace(self.config, **changes))
        other.load_state_dict(self.state_dict())
        other.provenance = self.provenance
        return other.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, H, W), of any side that the factor divides, to features (B, h * w, D)."""
        grid = pixels.shape[2] // self.config.factor, pixels.shape[3] // self.config.factor
        x: Tensor = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        found, taken = dict[int, Tensor](), self.config.taken
        for layer, block in enumerate(self.blocks, -len(self.blocks)):
            if layer > max(taken):
                break
            x = block(x)
            if layer in taken:
                found[layer] = self._normed(x, grid, last=layer == -1)
        return combined([found[layer] for layer in taken], self.config.combine)

    def _normed(self, x: Tensor, grid: tuple[int, int], last: bool) -> Tensor:
        """The output of a block (B, d, H, W) to (B, h * w, d); only the last block's norm has weights of its own."""
        x = (x if x.shape[2:] == grid else F.adaptive_avg_pool2d(x, grid)).flatten(2).transpose(1, 2)
        out: Tensor = self.norm(x) if last else F.layer_norm(x, x.shape[2:])
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in 0..1 to features (B, N, D), row by row; a DigitError for images of another shape."""
        self.preprocessing.check(images)
        return self.features(self.preprocessing(images).to(self.stem.weight.dtype))
