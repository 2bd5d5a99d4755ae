"""The codebook: k-means centroids, and the assignment of features to the nearest one.

Source: the paper's section 3; the distance is the authors' (DAMO-NLP-SG/DiGIT at cd6d8ca): |x|^2 - 2 x.c + |c|^2, the
lowest id on ties. They compute it in half precision; here it is float32 whatever the model runs in.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from digit.core.config import PositiveInt, config
from digit.core.errors import DigitError
from digit.models.component import Component

Positions = Literal["hub", "dinov2-offset"]
"""How an encoder stretches its table of positions to another grid; see :class:`digit.encoders.EncoderConfig`."""

_CHUNK_ELEMENTS = 1 << 24  # distances held at a time: 64 MiB in float32


def nearest(features: Float[Tensor, "*B D"], centroids: Float[Tensor, "K D2"], half: bool = False) -> Int[Tensor, "*B"]:
    """The id of the nearest centroid (squared Euclidean distance, the lowest id on ties), in 64 MiB beyond the inputs;
    a DigitError where the widths D differ. ``half`` computes in float16, as the authors did; near ties then fall
    otherwise.
    """
    if features.shape[-1] != centroids.shape[-1]:
        raise DigitError(
            f"The features are {features.shape[-1]} wide and the codebook {centroids.shape[-1]}: "
            "this codebook was fitted on another encoder or layer."
        )
    dtype = torch.float16 if half else torch.float32
    flat = features.reshape(-1, features.shape[-1])  # (n, D)
    with torch.autocast(flat.device.type, enabled=False):
        transposed = centroids.to(dtype).T.contiguous()  # (D, K)
        norms = transposed.square().sum(0)  # (K,)
        ids = torch.empty(len(flat), dtype=torch.long, device=flat.device)
        rows = max(1, _CHUNK_ELEMENTS // len(centroids))
        for start in range(0, len(flat), rows):
            x = flat[start : start + rows].to(dtype)  # (r, D)
            # |x|^2 changes no order in exact arithmetic, but in half precision it decides the near ties
            distances = (
                x.square().sum(1, keepdim=True) - 2 * (x @ transposed) + norms if half else norms - 2 * (x @ transposed)
            )
            ids[start : start + rows] = distances.argmin(1)  # (r,)
    return ids.view(features.shape[:-1])


@config
class CodebookConfig:
    """K centroids of the encoder's feature width D.

    Attributes:
        depth: tokens a place, d; more than 1 in a residual codebook, which has K centroids for each.
        half_precision: assign in float16; see :func:`nearest`.
        positions: of the encoder whose features it was fitted on; None if that has no such choice, or nobody wrote it
            down.
    """

    clusters: PositiveInt
    dim: PositiveInt
    half_precision: bool = False
    positions: Positions | None = None
    depth: PositiveInt = 1

    def describe(self) -> str:
        """Its shape in a line."""
        half = ", assigned in half precision" if self.half_precision else ""
        depth = f", {self.depth} residual tokens a place" if self.depth > 1 else ""
        return f"{self.clusters:,} clusters of width {self.dim}{depth}{half}"


class Codebook(Component):
    """K centroids (K, D), or (d K, D) with d tokens a place: those of the features, then those of what the ones before
    leave over (residual quantisation, as in Lee et al. 2022, arXiv 2203.01941).
    """

    config_class = CodebookConfig
    config: CodebookConfig

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.centroids = nn.Parameter(torch.zeros(config.depth * config.clusters, config.dim), requires_grad=False)

    @classmethod
    def from_centroids(
        cls, centroids: Float[Tensor, "K D"], provenance: dict[str, Any] | None = None, depth: int = 1, **fields: Any
    ) -> Codebook:
        """A codebook of given centroids (d K, D) at a depth of d; further fields of its config may be given."""
        rows, dim = centroids.shape
        book = cls(CodebookConfig(clusters=rows // depth, dim=dim, depth=depth, **fields))
        book.centroids.data = centroids.float().clone()
        book.provenance = provenance or {}
        return book.eval()

    def check_encoder(self, encoder: Any) -> None:
        """Raise DigitError for an encoder of other features than those it was fitted on, as far as both tell."""
        if encoder.dim != self.config.dim:
            raise DigitError(
                f"The parts do not fit: the feature width is {encoder.dim} in the encoder and {self.config.dim} in the "
                "codebook, which was fitted on another encoder. Fit one with: digit fit-codebook"
            )
        given = getattr(getattr(encoder, "config", None), "positions", None)
        # codebooks of the first edition have it in their provenance alone
        fitted = self.config.positions or (self.provenance.get("encoder") or {}).get("positions")
        if given and fitted and given != fitted:
            raise DigitError(
                f"The codebook was fitted on features of an encoder with positions '{fitted}', and this encoder has "
                f"'{given}': a good part of the tokens would differ. Convert the encoder with: digit convert encoder "
                f"--positions {fitted}"
            )

    def tokens(self, features: Float[Tensor, "B N D"]) -> Int[Tensor, "B n"]:
        """What a prior reads, n = d N ids in [0, d K): place by place, and at a place depth by depth. Those of depth j
        begin at j K, as the centroids do.
        """
        ids = self.assign(features)
        if self.config.depth == 1:
            return ids
        first = torch.arange(0, len(self.centroids), self.config.clusters, device=ids.device)  # (d,)
        return (ids + first).flatten(1)

    @property
    def tables(self) -> Float[Tensor, "d K D"]:
        """The centroids of each depth."""
        return self.centroids.view(self.config.depth, -1, self.config.dim)

    def assign(self, features: Float[Tensor, "*B D"]) -> Int[Tensor, "*A"]:
        """The nearest centroid's id, in [0, K): (*B,), or (*B, d) where the depth d is more than 1."""
        if self.config.depth == 1:
            return nearest(features, self.centroids, self.config.half_precision)
        ids, rest = [], features.float()
        for table in self.tables:
            ids.append(nearest(rest, table, self.config.half_precision))
            rest = rest - table[ids[-1]]
        return torch.stack(ids, -1)

    def lookup(self, tokens: Int[Tensor, "*A"]) -> Float[Tensor, "*B D"]:
        """What ids stand for, (*B, D): their centroids, or the sums of theirs over the depth."""
        if self.config.depth == 1:
            return self.centroids[tokens]
        return self.tables[torch.arange(self.config.depth, device=tokens.device), tokens].sum(-2)
