"""What later works do to the inputs of token models: part of the ``objective`` section of a preset, off by default.

Sources: reAR, He et al. 2025, arXiv 2510.04450, and QY-H00/reAR at 93ac0f0, modeling/rear.py; RobusTok, arXiv
2509.12474; RAR, Yu et al. 2024, arXiv 2411.00776.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digit.core.config import PositiveInt, Share, config, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.core.hub import INDEX
from digit.data.token_cache import TokenCache
from digit.models.codebook import Codebook
from digit.models.vqgan import VQGAN
from digit.pipeline.assembly import part_folder
from digit.training.task import Batch

_CHUNK = 1 << 24  # distances held at a time
_REMOVED = ("alignment", "soft_targets", "random_order")


@config
class Auxiliary:
    """Which of them are on, as ``presets/bases/tokens.yaml`` explains; zero, false and null are off.

    Attributes:
        token_noise: a share eps of the input tokens is random, eps uniform between 0 and
            ``token_noise * max(0, 1 - 4 t / 3)`` for each image, t the part of the run that is over.
        prefix_tokens, prefix_neighbours: share of a disturbed image's tokens that are replaced, and by one of how many
            nearest centroids; the number falls to its half in the course of the run.
        order_annealing: role "random" only, which is then validated row by row.
        centroid_embeddings: centred, turned and scaled like the usual random vectors.
        codebook: a model folder (see ``digit assemble``), or a codebook or a VQGAN by itself.
    """

    token_noise: Share = 0.0
    prefix_noise: Share = 0.0
    prefix_tokens: Share = 1.0
    prefix_neighbours: PositiveInt = 100
    order_annealing: tuple[Share, Share] | None = None
    centroid_embeddings: bool = False
    codebook: str | None = None

    def __post_init__(self) -> None:
        if self.order_annealing and self.order_annealing[0] >= self.order_annealing[1]:
            raise ValueError(f"order_annealing={self.order_annealing}: expected two parts of the run, low < high")
        needing = [name for name in ("prefix_noise", "centroid_embeddings") if getattr(self, name)]
        if needing and self.codebook is None:
            raise ValueError(
                f"{', '.join(needing)} needs 'codebook', the model folder that the token cache was made with"
            )

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that are not as they are by default; where the codebook lies does not count."""
        usual = to_dict(Auxiliary())
        return {name: value for name, value in to_dict(self).items() if value != usual[name] and name != "codebook"}

    def draw(self, batch: Mapping[str, Tensor], vocab_size: int, generator: torch.Generator) -> Batch:
        """The random numbers of a batch: they depend on seed and step alone."""

        def uniform(like: Tensor) -> Tensor:
            return torch.rand(like.shape, generator=generator)

        tokens, drawn = batch["tokens"], Batch()
        if self.token_noise:
            drawn |= {"noise_share": uniform(tokens[:, 0]), "noise_rank": uniform(tokens)}
            drawn["noise"] = torch.randint(vocab_size, tokens.shape, generator=generator)
        if self.prefix_noise:
            prefix = batch["prefix"]
            drawn["prefix_row"] = uniform(tokens[:, 0])
            drawn |= {"prefix_rank": uniform(prefix), "prefix_choice": uniform(prefix)}
        if self.order_annealing:
            drawn["order_draw"] = uniform(tokens[:, 0])
        return drawn

    def disturb(self, batch: Mapping[str, Tensor], progress: float, near: Tensor | None) -> Batch:
        """What the network is shown instead of the truth: those of "inputs" (B, n), "prefix" (B, P) and "order" (B, n)
        that are disturbed, at the part ``progress`` of the run. ``batch`` has what :meth:`draw` gave, and ``near``
        (K, m) holds the nearest other semantic tokens of each, for ``prefix_noise``.
        """
        shown = Batch()
        if self.token_noise:
            share = batch["noise_share"] * self.token_noise * max(0.0, 1 - 4 * progress / 3)  # (B,)
            shown["inputs"] = torch.where(batch["noise_rank"] < share[:, None], batch["noise"], batch["tokens"])
        if self.prefix_noise:
            assert near is not None
            count = max(1, round(near.shape[1] * (1 - progress / 2)))
            other = near[batch["prefix"], (batch["prefix_choice"] * count).long().clamp(max=count - 1)]  # (B, P)
            swap = (batch["prefix_row"] < self.prefix_noise)[:, None] & (batch["prefix_rank"] < self.prefix_tokens)
            shown["prefix"] = torch.where(swap, other, batch["prefix"])
        if self.order_annealing:
            low, high = self.order_annealing
            raster = torch.arange(batch["order"].shape[1], device=batch["order"].device)
            random = batch["order_draw"] < (high - progress) / (high - low)  # (B,)
            shown["order"] = torch.where(random[:, None], batch["order"], raster)
        return shown


def known_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An ``objective`` section without the removed losses: a warning where they are off, else a DigitError."""
    for name in _REMOVED:
        if values.get(name):
            raise DigitError(f"{where} has {name} = {values[name]}; this loss was removed, for nothing used it.")
        if name in values:
            warnings.warn(f"The field '{name}' was removed; leave it out.", FutureWarning, stacklevel=2)
    return {name: value for name, value in values.items() if name not in _REMOVED}


def neighbours(centroids: Tensor, count: int, depth: int = 1) -> Tensor:
    """The nearest other centroids of each of (K, D), the nearest first, of a residual codebook (d K, D) at the same
    depth: ids (K, m) int64, m = min(count, K - 1).
    """
    if depth > 1:
        tables = centroids.chunk(depth)
        return torch.cat([neighbours(table, count) + j * len(table) for j, table in enumerate(tables)])
    x, ids = centroids.double(), []
    for rows in torch.split(torch.arange(len(x)), max(1, _CHUNK // len(x))):
        distances = torch.cdist(x[rows], x)  # (r, K)
        distances[torch.arange(len(rows)), rows] = torch.inf
        ids.append(distances.topk(min(count, len(x) - 1), largest=False).indices)
    return torch.cat(ids)


@torch.no_grad()
def set_embeddings(table: nn.Embedding, centroids: Tensor) -> None:
    """Let token vectors (K, dim) begin as centroids (K, D): centred, turned at random, at the same scale."""
    turn = nn.init.orthogonal_(torch.empty(centroids.shape[1], table.weight.shape[1]))  # (D, dim)
    vectors = (centroids.float() - centroids.float().mean(0)) @ turn
    table.weight.copy_(vectors * (table.weight.std() / vectors.std()))


def load_centroids(folder: str, kinds: set[str], cache: TokenCache) -> dict[str, Tensor]:
    """The centroids (K, D) of kinds of tokens; a DigitError where the folder has none, or not as many as the cache."""
    whole = (Path(folder) / INDEX).is_file()
    found = {}
    for kind in sorted(kinds):
        part: type[Codebook | VQGAN] = Codebook if kind == "semantic" else VQGAN
        place = Path(folder) / part.__name__.lower() if whole else part_folder(folder)
        if not (place / "config.json").is_file() or read_json(place / "config.json").get("type") != part.__name__:
            raise DigitError(
                f"objective.codebook = {folder} has no {part.__name__}, whose centroids the {kind} tokens stand for."
            )
        saved = part.from_pretrained(place)
        vectors = saved.centroids if isinstance(saved, Codebook) else saved.codebook
        size = cache.space(kind).vocab_size  # type: ignore[arg-type]
        if len(vectors) != size:
            raise DigitError(
                f"{place} has {len(vectors)} centroids, but the {kind} tokens of the cache {cache.folder} are {size}; "
                "give the model that the cache was made with."
            )
        found[kind] = vectors.detach()
    return found
