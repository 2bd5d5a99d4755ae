"""The decoder of a representation autoencoder (stage 2): centroids of semantic tokens to pixels, in a single pass.

RAE (Zheng et al. 2025, arXiv 2510.11690) trains a ViT to turn an encoder's features back into images. A centroid is
such a feature, averaged, so a decoder that was trained on the codebook's encoder makes images of tokens without any
training here. The network is diffusers' own; :mod:`digit.convert.rae` reads it out of an ``AutoencoderRAE``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.core.errors import require
from digit.models.component import Component
from digit.models.token_model import Labels


@config
class RAEConfig:
    """What the decoder reads, and the shape of its network.

    Attributes:
        prefix_vocab_size: K, the semantic vocabulary.
        feature_dim: width D of the encoder's features.
        side: semantic tokens along a side of the image.
        patch: pixels along a side that a token becomes.
        dim, depth, heads, hidden_dim: width, blocks, attention heads and MLP width of the network.
    """

    role: Literal["rae"] = "rae"
    head: Literal["features"] = "features"
    prefix_vocab_size: PositiveInt
    feature_dim: PositiveInt
    side: PositiveInt
    patch: PositiveInt
    dim: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    hidden_dim: PositiveInt

    vocab_size = num_classes = 0  # there are neither VQ tokens nor classes
    can_guide = False

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the semantic tokens."""
        return self.side, self.side

    @property
    def prefix_length(self) -> int:
        """Semantic tokens an image, N."""
        return self.side**2

    length = prefix_length

    @property
    def resolution(self) -> int:
        """Side of the images."""
        return self.side * self.patch

    def describe(self) -> str:
        """Its shape in a line."""
        return (
            f"RAE, {self.depth} blocks of width {self.dim}, {self.heads} heads; {self.resolution} px from "
            f"{self.prefix_length} of {self.prefix_vocab_size:,} centroids of width {self.feature_dim}"
        )


class RAEDecoder(Component):
    """The centroids as the network knows features, and diffusers' ``RAEDecoder``.

    Attributes:
        features: (K, D), the centroids without the gain and offset of the encoder's final norm.
        mean, std: (3,) of the pixels that the network gives.
    """

    config_class = RAEConfig
    config: RAEConfig

    def __init__(self, config: RAEConfig) -> None:
        super().__init__(config)
        self.features = nn.Parameter(torch.zeros(config.prefix_vocab_size, config.feature_dim), requires_grad=False)
        self.mean, self.std = (nn.Parameter(value, requires_grad=False) for value in (torch.zeros(3), torch.ones(3)))
        theirs = require("diffusers.models.autoencoders.autoencoder_rae", "diffusers", "The decoder of an RAE")
        self.network: Any = theirs.RAEDecoder(
            hidden_size=config.feature_dim,
            decoder_hidden_size=config.dim,
            decoder_num_hidden_layers=config.depth,
            decoder_num_attention_heads=config.heads,
            decoder_intermediate_size=config.hidden_dim,
            num_patches=config.prefix_length,
            patch_size=config.patch,
            image_size=config.resolution,
        )
        with torch.device("cpu"):  # not in the file, so it must have values where the rest is built without
            table = theirs.get_2d_sincos_pos_embed(config.dim, config.side, cls_token=True, extra_tokens=1)
        self.network.decoder_pos_embed = table.float()[None]  # (1, 1 + N, dim)

    def forward(
        self, tokens: Int[Tensor, "B N"], _noise: Tensor | None = None, _labels: Labels = None
    ) -> Float[Tensor, "B 3 S S"]:
        """Decode semantic tokens to images, nominally 0..1, not clamped."""
        patches = self.network(self.features[tokens]).logits  # (B, N, patch * patch * 3)
        images: Tensor = self.network.unpatchify(patches)
        return images * self.std.view(3, 1, 1) + self.mean.view(3, 1, 1)
