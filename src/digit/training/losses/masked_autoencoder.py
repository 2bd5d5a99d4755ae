"""The masked autoencoder: rebuild hidden patches from visible ones. The reconstructive baseline that the paper's Fig 4a
calls MAE.

Source: He et al. 2021, arXiv 2111.06377: 75% of the patches hidden, only visible ones encoded, a light decoder, the
mean squared error on the hidden patches' pixels, each patch normalised.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.encoders.transformers_encoder import TransformersEncoder
from digit.models.transformer import Transformer, TransformerConfig, init_weights
from digit.training.losses.pairs import drawn_views, taken
from digit.training.losses.projection import Method, TrainableEncoder, check_trainable
from digit.training.task import Batch, Step
from digit.training.views import Views, apply_views


@config
class MaskedAutoencoderObjective:
    """Hidden patches of an image should be rebuilt from the visible ones.

    Attributes:
        method: "mae".
        views: how the image is cropped; colours are usually left alone.
        hidden_share: share of the patches that is hidden.
        decoder_dim, decoder_depth, decoder_heads: shape of the decoder, which is thrown away.
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
        check_trainable(encoder, masks=True)
        assert isinstance(encoder, TransformersEncoder)
        self.encoder = encoder
        self.objective = objective
        self.patches = encoder.grid[0] * encoder.grid[1]
        self.modules: dict[str, nn.Module] = {"student": MaskedAutoencoder(encoder, objective)}

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """The random numbers of the view, and the order of its patches, of which the first are visible."""
        batch = drawn_views(count, [self.objective.views], generator)
        return {**batch, "order": torch.rand(count, self.patches, generator=generator).argsort(1)}

    def loss(
        self, modules: nn.ModuleDict, images: Tensor, batch: Batch, _step: Step
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of images (B, 3, S, S) in 0..1, and metrics."""
        view = apply_views(images, taken(batch, "view0"), self.encoder.preprocessing.image_size)
        return modules["student"](view, batch["order"]), {}
