"""What the paper lacks and later works found for token models: the ``objective`` section of a preset, everything off by
default.

| field | idea | from |
|---|---|---|
| ``token_noise`` | random tokens among the inputs, fewer and fewer | [0] |
| ``alignment`` | hidden states must show the codebook vectors of this token and of the next | [0] |
| ``soft_targets`` | a part of the target goes to the neighbours of the right token in the codebook | [1] |
| ``prefix_noise`` | a decoder's semantic prefix is swapped for neighbours, as a prior would err | [2] |
| ``random_order`` | tokens in a random order first, in raster order at last | [3] |
| ``centroid_embeddings`` | token vectors begin as the centroids, turned into the model's width | [0], [4] |

What they add to a network serves training alone. :func:`plain` gives the token model that is saved: it has the usual
tensors.

Sources: [0] He et al. 2025, arXiv 2510.04450 (reAR), and QY-H00/reAR at 93ac0f0, modeling/rear.py; [1] in the spirit of
    SNCE, arXiv
2603.15150: it weighs neighbours by their distance to the image's own feature, which a token cache does not keep, so
    here it is the
distance to the right token's centroid; [2] arXiv 2509.12474 (RobusTok); [3] Yu et al. 2024, arXiv 2411.00776 (RAR); [4]
this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from digit.core.config import config, to_dict
from digit.core.errors import DigitError
from digit.core.files import read_json
from digit.data.token_cache import TokenCache
from digit.models.codebook import Codebook
from digit.models.token_model import TokenModel, TokenModelConfig
from digit.models.transformer import PositiveInt, Probability, init_weights
from digit.models.vqgan import VQGAN
from digit.pipeline.assembly import part_folder
from digit.pipeline.pipeline import INDEX
from digit.training.task import Batch

Share = Annotated[float, Field(ge=0, le=1)]
_SOFT_NEIGHBOURS = 16  # of a softened target; further away a softmax of squared distances is as good as zero
_CHUNK = 1 << 24  # distances held at a time


@config
class Extras:
    """Which of them are on. Zero, false and null are off.

    Attributes:
        token_noise: of the input tokens a share eps is replaced by random ones, eps uniform between 0 and
            ``token_noise * max(0, 1 - 4 t / 3)`` for each image, t the part of the run that is over. reAR: 1.
        alignment: weight of the two alignment losses, each 1 - cosine. reAR: 1. Causal models only.
        soft_targets: share of a target that its 16 nearest neighbours get, by a softmax of minus their squared distance
            over the mean squared distance of nearest neighbours.
        prefix_noise: share of the images whose prefix is disturbed. RobusTok: 0.1. Decoders only.
        prefix_tokens: share of such an image's tokens that are replaced.
        prefix_neighbours: by one of how many nearest centroids; the number falls to its half in the course of the run.
        random_order: share of the images that come in random order in the first half of the run; it falls to 0 until
            three quarters of it. RAR: 1. Causal models only.
        centroid_embeddings: begin with the centroids as token vectors: centred, turned and scaled like the usual random
            ones.
        codebook: whose centroids: a model folder (see ``digit assemble``), or a codebook or a VQGAN by itself.
    """

    token_noise: Share = 0.0
    alignment: Annotated[float, Field(ge=0)] = 0.0
    soft_targets: Probability = 0.0
    prefix_noise: Share = 0.0
    prefix_tokens: Share = 1.0
    prefix_neighbours: PositiveInt = 100
    random_order: Share = 0.0
    centroid_embeddings: bool = False
    codebook: str | None = None

    def __post_init__(self) -> None:
        needing = [
            name
            for name in ("alignment", "soft_targets", "prefix_noise", "centroid_embeddings")
            if getattr(self, name) and self.codebook is None
        ]
        if needing:
            raise ValueError(
                f"{', '.join(needing)} needs 'codebook', the model folder that the token cache was made with"
            )

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that are not as they are by default; where the codebook lies does not count."""
        usual = to_dict(Extras())
        return {name: value for name, value in to_dict(self).items() if value != usual[name] and name != "codebook"}

    def check(self, model: TokenModelConfig) -> None:
        """See that they make sense for a model.

        Raises:
            DigitError: names what does not.
        """
        for name in ("alignment", "random_order"):
            if getattr(self, name) and model.role == "masked":
                raise DigitError(
                    f"objective.{name} is for models that predict the next token; role 'masked' has no order."
                )
        if self.prefix_noise and not model.prefix_length:
            raise DigitError("objective.prefix_noise is for decoders; this model has no semantic prefix to disturb.")
        if self.soft_targets + model.label_smoothing >= 1:
            raise DigitError(
                "objective.soft_targets and model.label_smoothing leave nothing of the right token's share."
            )

    # -- random choices: drawn with the batch, applied when it is known how far the run is
    # ---------------------------------------

    def draw(self, batch: Mapping[str, Tensor], vocab_size: int, generator: torch.Generator) -> Batch:
        """The random numbers of a batch: they depend on seed and step alone."""

        def uniform(like: Tensor) -> Tensor:
            return torch.rand(like.shape, generator=generator)

        tokens, drawn = batch["tokens"], Batch()
        rows = tokens[:, 0]
        if self.token_noise:
            drawn |= {"noise_share": uniform(rows), "noise_rank": uniform(tokens)}
            drawn["noise"] = torch.randint(vocab_size, tokens.shape, generator=generator)
        if self.prefix_noise:
            prefix = batch["prefix"]
            drawn |= {"prefix_row": uniform(rows), "prefix_rank": uniform(prefix), "prefix_choice": uniform(prefix)}
        if self.random_order:
            drawn |= {"order_row": uniform(rows), "order": uniform(tokens).argsort(1)}
        return drawn

    def disturb(self, batch: Mapping[str, Tensor], progress: float, near: Tensor | None) -> Batch:
        """What the network is shown instead of the truth.

        Args:
            batch: with what :meth:`draw` gave.
            progress: t, the part of the run that is over.
            near: (K, m) the nearest other semantic tokens of each, for ``prefix_noise``.

        Returns:
            Those of "inputs" (B, n), "prefix" (B, P) and "order" (B, n) that are disturbed.
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
        if self.random_order:
            share_random = self.random_order * min(1.0, max(0.0, 3 - 4 * progress))
            raster = torch.arange(batch["order"].shape[1], device=batch["order"].device)
            shown["order"] = torch.where((batch["order_row"] < share_random)[:, None], batch["order"], raster)
        return shown


class ExtrasLoss(nn.Module):
    """A token model with its extras as the loop trains it: its forward pass is its loss.

    In eval mode it is the loss of the plain model on undisturbed tokens.
    """

    def __init__(self, model: TokenModel, extras: Extras, centroids: Tensor | None = None, z_loss: float = 0.0) -> None:
        """Prepare the heads and tables that are trained beside the model.

        Args:
            model: with ``random_order`` its table of positions gets a second one added, see :class:`TargetPositions`.
            extras: which are on.
            centroids: (vocab, D) of the tokens that are predicted, for ``alignment`` and ``soft_targets``.
            z_loss: see :meth:`TokenModel.loss`.
        """
        super().__init__()
        extras.check(model.config)
        self.model, self.extras, self.z_loss = model, extras, z_loss
        dim, depth = model.config.transformer.dim, model.config.transformer.depth
        if extras.random_order:
            parametrize.register_parametrization(
                model.position_embedding, "weight", TargetPositions(model.config.length, dim)
            )
        if extras.soft_targets:
            assert centroids is not None
            near, squared = neighbours(centroids, _SOFT_NEIGHBOURS)
            self.register_buffer("near", near, persistent=False)  # (vocab, m)
            weights = torch.softmax(-squared / squared[:, 0].mean().clamp(min=1e-12), 1)
            self.register_buffer("near_weights", weights, persistent=False)  # (vocab, m)
        if extras.alignment:
            assert centroids is not None
            self.register_buffer("centroids", centroids.float(), persistent=False)  # (vocab, D)
            self.aligners = nn.ModuleList(_head(dim, centroids.shape[1]) for _ in range(2))
            self._tapped = (0, -(-3 * depth // 4) - 1)  # after the first block, and after three quarters of them

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        prefix: Tensor | None = None,
        mask: Tensor | None = None,
        inputs: Tensor | None = None,
        order: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss.

        Args:
            tokens: (B, n) what is to be predicted.
            labels, prefix, mask: see :meth:`TokenModel.loss`.
            inputs: (B, n) what is shown as earlier or visible tokens; None shows ``tokens``.
            order: (B, n) the order in which they come; None is raster order.

        Returns:
            The loss, and "nll", "accuracy" and, with ``alignment``, "alignment" (the mean of both losses).
        """
        if not self.training:
            return self.model.loss(tokens, labels, prefix, mask)
        model = self.model
        x = self._embed(tokens if inputs is None else inputs, labels, prefix, mask, order)  # (B, P + 1 + ..., D)
        with self._taps() as taps:
            states = model.transformer(x)
        logits = model.head(states[:, model.config.prefix_length + (mask is not None) :])  # (B, n, vocab)
        targets = tokens if order is None else tokens.gather(1, order)
        if mask is None:
            scored, right = logits.flatten(0, 1), targets.flatten()  # (B * n, vocab), (B * n,)
        else:
            scored, right = logits[mask], targets[mask]  # (m, vocab), (m,)
        loss, metrics = model.score(scored, right, self.z_loss)
        if self.extras.soft_targets:
            loss = loss + self.extras.soft_targets * self._softening(scored.float(), right)
        if self.extras.alignment:
            misaligned = self._misalignment(taps, targets)
            loss = loss + self.extras.alignment * misaligned
            metrics["alignment"] = misaligned.detach() / 2
        return loss, metrics

    def _embed(
        self, seen: Tensor, labels: Tensor | None, prefix: Tensor | None, mask: Tensor | None, order: Tensor | None
    ) -> Tensor:
        model = self.model
        if mask is not None:
            return model.embed(seen, labels, prefix, mask)
        if order is None:
            return model.embed(seen[:, :-1], labels, prefix)
        # a place knows where its token stands, and where the token stands that it is to predict
        own = torch.cat([torch.zeros_like(order[:, :1]), order[:, :-1] + 1], dim=1)  # (B, n)
        parts = cast(Any, model.position_embedding).parametrizations.weight
        positions = F.embedding(own, parts.original) + F.embedding(order, parts[0].table)  # (B, n, D)
        shuffled = model.embed_tokens(seen.gather(1, order)[:, :-1])  # (B, n - 1, D)
        x = torch.cat([model.embed_start(labels, len(seen)), shuffled], dim=1) + positions
        return x if prefix is None else torch.cat([model.embed_prefix(prefix), x], dim=1)

    @contextmanager
    def _taps(self) -> Iterator[list[Tensor]]:
        """Collect the states after the tapped blocks, (B, T, D) each, in the order of the blocks."""
        taps: list[Tensor] = []
        numbers = self._tapped if self.extras.alignment else ()
        hooks = [
            self.model.transformer.blocks[number].register_forward_hook(lambda _module, _inputs, out: taps.append(out))
            for number in numbers
        ]
        try:
            yield taps
        finally:
            for hook in hooks:
                hook.remove()

    def _misalignment(self, taps: list[Tensor], targets: Tensor) -> Tensor:
        """Both losses: of the token that stands at a place, and of the one it predicts; the truth, not what was
        shown.
        """
        first = self.model.config.prefix_length
        vectors = cast(Tensor, self.centroids)[targets]  # (B, n, D)
        current, following = (head(state[:, first:]).float() for head, state in zip(self.aligners, taps, strict=True))
        shown = 1 - F.cosine_similarity(current[:, 1:], vectors[:, :-1], dim=-1).mean()
        return shown + 1 - F.cosine_similarity(following, vectors, dim=-1).mean()

    def _softening(self, logits: Tensor, targets: Tensor) -> Tensor:
        """By how much the cross entropy grows if the whole target goes to the neighbours (m, vocab), (m,).

        sum_k w_k (-log p_k) + log p_target; the logarithm of the softmax's sum cancels.
        """
        near, weights = cast(Tensor, self.near)[targets], cast(Tensor, self.near_weights)[targets]  # (m, 16)
        right = logits.gather(1, targets[:, None])[:, 0]
        return (right - (weights * logits.gather(1, near)).sum(1)).mean()


class TargetPositions(nn.Module):
    """A second table of positions, of the token that a place is to *predict*, added to that of the token which stands
    there.

    In raster order the one follows from the other, so both tables are one: what is exported is the sum. Source: RAR,
        section 3.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, dim))

    def forward(self, weight: Tensor) -> Tensor:
        """The table for raster order (1 + length, D); nothing is predicted from the last token."""
        return weight + F.pad(self.table, (0, 0, 0, 1))


def plain(model: TokenModel) -> TokenModel:
    """The model with what training adds to its weights (target positions, low-rank changes) merged into them; a new one
    if need be.
    """
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    with torch.device("meta"):
        merged = TokenModel(model.config)
    # a parametrized weight, read as an attribute, is the merged one
    tensors = {name: attrgetter(name)(model).detach().clone() for name in merged.state_dict()}
    merged.load_state_dict(tensors, assign=True)
    merged.train(model.training)
    return merged


def neighbours(centroids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The nearest other centroids of each of (K, D).

    Returns:
        Their ids (K, m) int64, the nearest first, and their squared distances (K, m), with m = min(count, K - 1).
    """
    x = centroids.double()
    ids, squared = [], []
    rows = max(1, _CHUNK // len(x))
    for start in range(0, len(x), rows):
        distances = torch.cdist(x[start : start + rows], x).square()  # (r, K)
        own = torch.arange(start, start + len(distances))
        distances[own - start, own] = torch.inf
        found = distances.topk(min(count, len(x) - 1), largest=False)
        ids.append(found.indices)
        squared.append(found.values.float())
    return torch.cat(ids), torch.cat(squared)


@torch.no_grad()
def set_embeddings(table: nn.Embedding, centroids: Tensor) -> None:
    """Let token vectors (K, dim) begin as centroids (K, D): centred, turned by a random semi-orthogonal matrix, at the
    same scale.
    """
    turn = nn.init.orthogonal_(torch.empty(centroids.shape[1], table.weight.shape[1]))  # (D, dim)
    vectors = (centroids.float() - centroids.float().mean(0)) @ turn
    table.weight.copy_(vectors * (table.weight.std() / vectors.std()))


def load_centroids(folder: str, kinds: set[str], cache: TokenCache) -> dict[str, Tensor]:
    """The centroids (K, D) of kinds of tokens ("semantic", "vq").

    Raises:
        DigitError: the folder has none of a kind, or not as many as the cache has tokens.
    """
    whole = (Path(folder) / INDEX).is_file()
    found = {}
    for kind in sorted(kinds):
        name, part = ("Codebook", "codebook") if kind == "semantic" else ("VQGAN", "vqgan")
        place = Path(folder) / part if whole else part_folder(folder)
        if not (place / "config.json").is_file() or read_json(place / "config.json").get("type") != name:
            raise DigitError(
                f"objective.codebook = {folder} has no {name}, whose centroids the {kind} tokens stand for."
            )
        vectors = (
            Codebook.from_pretrained(place).centroids if kind == "semantic" else VQGAN.from_pretrained(place).codebook
        ).detach()
        if len(vectors) != cache.space(kind).vocab_size:  # type: ignore[arg-type]
            raise DigitError(
                f"{place} has {len(vectors)} centroids, but the {kind} tokens of the cache {cache.folder} are "
                f"{cache.space(kind).vocab_size}; give the model that the cache was made with."  # type: ignore[arg-type]
            )
        found[kind] = vectors
    return found


def _head(dim: int, out: int) -> nn.Sequential:
    """From hidden states to a codebook's vectors: two hidden layers, as reAR's code has it."""
    head = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, out))
    init_weights(head)
    return head
