"""The token model: one network for the prior, the AR decoder, the masked decoder and the VQ-token baselines.

A sequence is ``[prefix | start | tokens]``. The prefix are the semantic tokens a decoder is conditioned on; the start
position holds the class, or a learned start vector where there is no class; the tokens are what the model predicts.

| role | prefix | attention | the output at a place is |
|---|---|---|---|
| prior (stage 1), VQ prior | - | causal | the next token |
| AR decoder (stage 2) | semantic | causal | the next VQ token |
| masked prior (stage 1), decoder (stage 2) or MaskGIT | - or semantic | both ways | the token that a mask hides there |
| random-order prior (stage 1) | - | causal, in any order | the token at the place that is asked for |

Of role "random" the sequence is ``[start | where, token, where, token, ...]``: an instruction before each token says at
which place it stands, so tokens may come in any order, and a cache may be asked for several places at once.

Ids are plain: 0..vocab_size-1. Start, class and mask are embeddings of their own. The null class of classifier-free
guidance *is* the start vector: dropping a label in training (``class_dropout``) and generating without one are the
same.

Sources: the paper's section 3 and, for the arithmetic, DAMO-NLP-SG/DiGIT at cd6d8ca; Chang et al. 2022, arXiv
2202.04200 (MaskGIT); Ho & Salimans 2022, arXiv 2207.12598 (label dropout); Pang et al. 2024, arXiv 2412.01827 (RandAR:
position instructions; here with learned absolute positions, where theirs are rotary).

Between embeddings and head stands a transformer, or, for the causal roles in raster order, a state-space model
(:mod:`digit.models.state_space`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from digit.core.errors import DigitError
from digit.models.component import Component
from digit.models.state_space import StateCache, StateSpace, init_as_mamba
from digit.models.token_config import TokenModelConfig
from digit.models.transformer import KVCache, Transformer, init_as_fairseq, init_weights

NO_LABEL = -1
"""In a tensor of labels: no class, the learned start vector."""

Ids = Int[Tensor, "B n"]
Labels = Int[Tensor, " B"] | None
"""Classes, ``NO_LABEL`` for none; None is all none."""
Prefix = Int[Tensor, "B P"] | None
"""Semantic ids in front, for decoders."""
Mask = Bool[Tensor, "B n"] | None
"""True where a token is hidden, or is to be sampled."""
Order = Int[Tensor, "B m"] | None
"""Places in the order of their tokens, for role "random"; None is row by row."""
Cache = KVCache | StateCache
"""What sampling keeps of the tokens so far."""


class TokenModel(Component):
    """Embeddings, the backbone and the output head. See the module for the layout of a sequence."""

    config_class = TokenModelConfig
    config: TokenModelConfig

    def __init__(self, config: TokenModelConfig) -> None:
        super().__init__(config)
        dim = config.backbone.dim
        self.token_embedding = nn.Embedding(config.vocab_size, dim)
        self.position_embedding = nn.Embedding(1 + config.length, dim)  # row 0: the start position
        self.start = nn.Parameter(torch.empty(dim))
        self.class_embedding = nn.Embedding(config.num_classes, dim) if config.num_classes else None
        self.mask_vector = nn.Parameter(torch.empty(dim)) if config.role == "masked" else None
        self.instruction = nn.Parameter(torch.empty(dim)) if config.role == "random" else None
        self.prefix_embedding = nn.Embedding(config.prefix_vocab_size, dim) if config.prefix_length else None
        self.prefix_position_embedding = nn.Embedding(config.prefix_length, dim) if config.prefix_length else None
        self.transformer = Transformer(config.transformer) if config.transformer else None
        self.state_space = StateSpace(config.state_space) if config.state_space else None
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        self._init_weights()

    @property
    def backbone(self) -> Transformer | StateSpace:
        """The network between embeddings and head."""
        found = self.transformer or self.state_space
        assert found is not None
        return found

    def _init_weights(self) -> None:
        std = self.config.backbone.dim**-0.5
        tables: list[nn.Embedding | nn.Linear | None] = [
            self.token_embedding,
            self.class_embedding,
            self.prefix_embedding,
        ]
        if self.config.init == "authors" and self.transformer is not None:
            init_as_fairseq(self.transformer)
            tables += [self.position_embedding, self.prefix_position_embedding, self.head]
        else:
            init_weights(self)
            # With embedding_scale sqrt(dim) a token's vector enters with std 1 and its position, which is not
            # multiplied, with std 0.02 (fairseq: 1 / sqrt(dim)): tokens outweigh positions until training says
            # otherwise. With embedding_scale 1 both have 0.02.
            tables = tables if self.config.embedding_scale != 1.0 else []
        if self.state_space is not None:
            init_as_mamba(self.state_space)
        for vector in (self.start, self.mask_vector, self.instruction):
            if vector is not None:
                nn.init.normal_(vector, std=std if self.config.init == "authors" else 0.02)
        for table in tables:
            if table is not None:
                nn.init.normal_(table.weight, std=std)

    def embed_start(self, labels: Labels, batch: int) -> Float[Tensor, "B 1 D"]:
        """The vectors at the start position, without their position: the class, or the start vector."""
        start = self.start.expand(batch, -1)  # (B, D)
        if labels is not None and self.class_embedding is not None:
            classes = self.class_embedding(labels.clamp(min=0))  # (B, D)
            start = torch.where((labels >= 0)[:, None], classes, start)
        return start[:, None] * self.config.embedding_scale

    def embed_prefix(self, prefix: Int[Tensor, "B P"]) -> Float[Tensor, "B P D"]:
        """Semantic ids to vectors with their positions."""
        if self.prefix_embedding is None or self.prefix_position_embedding is None:
            raise DigitError("This model takes no semantic prefix, but one was given; only decoders do.")
        x: Tensor = self.prefix_embedding(prefix) * self.config.embedding_scale + self.prefix_position_embedding.weight
        return x

    def embed_tokens(self, tokens: Int[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None = None) -> Float[Tensor, "*n D"]:
        """Ids to vectors without positions; where ``mask`` is True the mask vector stands."""
        x: Tensor = self.token_embedding(tokens)
        if mask is not None:
            if self.mask_vector is None:
                raise DigitError(
                    f"A mask was given to a model of role '{self.config.role}'; only role 'masked' takes one."
                )
            x = torch.where(mask[..., None], self.mask_vector, x)
        return x * self.config.embedding_scale

    def embed(
        self, tokens: Ids, labels: Labels = None, prefix: Prefix = None, mask: Mask = None, order: Order = None
    ) -> Float[Tensor, "B T D"]:
        """The backbone's input, T = P + 1 + n, for n <= length tokens; of role "random" T = 2 m."""
        self._check(tokens, labels, prefix, order)
        if self.instruction is not None:
            order = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if order is None else order
            at = self.position_embedding(1 + order)  # (B, m, D)
            given = self.embed_tokens(tokens.gather(1, order), mask) + at  # (B, m, D)
            pairs = torch.stack([self.instruction + at, given], dim=2).flatten(1, 2)  # (B, 2 m, D)
            start = self.embed_start(labels, len(tokens)) + self.position_embedding.weight[:1]
            return torch.cat([start, pairs[:, :-1]], dim=1)  # nothing is asked for after the last token
        x = self._embed_tail(tokens, labels, mask)
        return x if prefix is None else torch.cat([self.embed_prefix(prefix), x], dim=1)

    def _embed_tail(self, tokens: Tensor, labels: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Start and tokens (B, 1 + n, D), with their positions."""
        x = torch.cat([self.embed_start(labels, len(tokens)), self.embed_tokens(tokens, mask)], dim=1)
        return x + self.position_embedding.weight[: x.shape[1]]

    def _check(self, tokens: Tensor, labels: Tensor | None, prefix: Tensor | None, order: Tensor | None) -> None:
        c = self.config
        if order is not None and c.role != "random":
            raise DigitError(f"An order was given to a model of role '{c.role}'; only role 'random' takes one.")
        if tokens.shape[1] > c.length:
            raise DigitError(f"{tokens.shape[1]} tokens an image were given; this model was built for {c.length}.")
        if (prefix is not None) != bool(c.prefix_length) or (prefix is not None and prefix.shape[1] != c.prefix_length):
            given = "none" if prefix is None else str(prefix.shape[1])
            raise DigitError(f"The semantic prefix has {given} tokens; this model expects {c.prefix_length or 'none'}.")
        if labels is not None and not c.num_classes and bool((labels >= 0).any()):
            raise DigitError("Class labels were given to an unconditional model; leave them out.")

    def forward(
        self, tokens: Ids, labels: Labels = None, prefix: Prefix = None, mask: Mask = None, order: Order = None
    ) -> Float[Tensor, "B m V"]:
        """Logits for tokens that are all known (teacher forcing), or for masked ones.

        Of role "masked", which alone takes a mask, m = n and place i predicts token i. Of role "random", which alone
        takes an order, logits i are those of token ``order[i]`` from the tokens at ``order[:i]``. Else m = n + 1, place
        i predicts token i from the tokens before it, and the last place stands after all that were given.
        """
        x = self.backbone(self.embed(tokens, labels, prefix, mask, order))
        if self.instruction is not None:
            asked: Tensor = self.head(x[:, 1::2])
            return asked
        skip = self.config.prefix_length + (1 if self.config.role == "masked" else 0)
        return self.of_depth(self.head(x[:, skip:]), 0)

    def of_depth(self, logits: Float[Tensor, "B m W"], first: int | Int[Tensor, ""]) -> Float[Tensor, "B m V"]:
        """Of all W = d V logits those of their token's depth; ``first`` is the number of the first token."""
        depth = self.config.codebook_depth
        if depth == 1:
            return logits
        apart = logits.view(*logits.shape[:2], depth, self.config.codes)  # (B, m, d, V)
        place = torch.arange(logits.shape[1], device=logits.device)
        return apart[:, place, (first + place) % depth]

    def states(self, tokens: Ids, labels: Labels = None, prefix: Prefix = None) -> list[Tensor]:
        """The embedding and every block's output, L + 1 tensors (B, P + 1 + n, D): the linear probe's features."""
        return self.backbone.states(self.embed(tokens, labels, prefix))

    def loss(
        self,
        tokens: Ids,
        labels: Labels = None,
        prefix: Prefix = None,
        mask: Mask = None,
        z_loss: float = 0.0,
        inputs: Ids | None = None,
        order: Order = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy in nats with label smoothing, and ``{"nll", "accuracy"}`` without.

        For role "masked" the mean runs over the masked places of the whole batch, else over all tokens. ``z_loss``
        weighs mean(log Z ^ 2), with Z the sum that the softmax divides by (PaLM, arXiv 2204.02311, section 5).
        ``inputs`` are shown as earlier or visible tokens instead of the true ones.
        """
        shown = tokens if inputs is None else inputs
        if self.config.role == "masked":
            if mask is None:
                raise DigitError("The loss of a masked model needs the mask that hides the tokens to predict.")
            logits, targets = self(shown, labels, prefix, mask)[mask], tokens[mask]  # (m, vocab), (m,)
        elif self.config.role == "random":
            logits = self(shown, labels, prefix, mask, order).flatten(0, 1)  # (B * m, vocab)
            targets = (tokens if order is None else tokens.gather(1, order)).flatten()
        else:
            logits = self(shown[:, :-1], labels, prefix).flatten(0, 1)  # (B * n, vocab)
            targets = tokens.flatten() % self.config.codes
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
        if z_loss:
            loss = loss + z_loss * logits.logsumexp(-1).square().mean()
        with torch.no_grad():
            nll = F.cross_entropy(logits, targets) if self.config.label_smoothing or z_loss else loss.detach()
            accuracy = (logits.argmax(-1) == targets).float().mean()
        return loss, {"nll": nll, "accuracy": accuracy}

    def drop_labels(self, labels: Int[Tensor, " B"], generator: torch.Generator | None = None) -> Int[Tensor, " B"]:
        """Replace labels by ``NO_LABEL`` with probability ``class_dropout``: what makes guidance possible later."""
        drop = torch.rand(labels.shape, generator=generator, device=labels.device) < self.config.class_dropout
        return torch.where(drop, torch.full_like(labels, NO_LABEL), labels)

    def new_cache(self, batch: int, spare: int = 0) -> Cache:
        """An empty cache for ``batch`` sequences of full length and ``spare`` positions, in the model's dtype."""
        if self.config.state_space is not None:
            return StateCache(self.config.state_space, batch, self.start.device, self.start.dtype)
        # the last token is never an input; of role "random" each has its instruction in front
        length = self.config.prefix_length + (1 if self.instruction is None else 2) * self.config.length + spare
        assert self.config.transformer is not None
        return KVCache(self.config.transformer, batch, length, self.start.device, self.start.dtype)

    def prefill(
        self,
        cache: Cache,
        batch: int,
        labels: Labels = None,
        prefix: Prefix = None,
        tokens: Ids | None = None,
        prefix_cached: bool = False,
    ) -> Float[Tensor, "B V"]:
        """Run prefix, start and any given tokens in one pass; the logits of the next token.

        With ``prefix_cached`` the cache holds the prefix already (it does not depend on labels or tokens) and is only
        added to.
        """
        if tokens is None:
            tokens = torch.zeros(batch, 0, dtype=torch.long, device=self.start.device)
        first = self.config.prefix_length if prefix_cached else 0
        x = self._embed_tail(tokens, labels) if prefix_cached else self.embed(tokens, labels, prefix)  # (B, T, D)
        if not prefix_cached:
            cache.clear()
        kv_len = first + x.shape[1]
        x = self.backbone(x, cache, torch.arange(first, kv_len, device=x.device), kv_len)
        logits = self.of_depth(self.head(x[:, -1:]), tokens.shape[1])
        return logits[:, 0]

    def step(
        self, cache: Cache, token: Int[Tensor, " B"], index: Int[Tensor, ""], kv_len: int | None = None
    ) -> Float[Tensor, "B V"]:
        """Feed token number ``index``; the logits of token ``index + 1``.

        ``kv_len`` is how many positions of the cache are read: at least prefix_length + index + 2; all by default.
        """
        x = self.embed_tokens(token[:, None]) + self.position_embedding(index + 1)  # (B, 1, D)
        x = self.backbone(x, cache, index + 1 + self.config.prefix_length, kv_len)
        return self.of_depth(self.head(x), index + 1)[:, 0]

    def query(
        self,
        cache: Cache,
        tokens: Ids,
        order: Int[Tensor, "B m"],
        known: int,
        cached: int | None = None,
        labels: Labels = None,
    ) -> Float[Tensor, "B q V"]:
        """Ask for several tokens at once: of each the logits as :meth:`forward` gives them where it alone comes next.

        Of role "random". Instructions see the known tokens and themselves, not one another. Their keys and values are
        replaced in the next call, when their tokens are known, so that the cache is always that of one token a step.

        Args:
            cache: of :meth:`new_cache`.
            tokens: by place, all of them; what stands at unknown places is not read.
            order: places; the first ``known`` have their tokens, the other q = m - known are asked for.
            known: how many.
            cached: ``known`` of the call before; None for the first.
            labels: of the first call.
        """
        x = self.embed(tokens, labels, order=order)  # (B, 2 m, D)
        first, slots = 1 + 2 * known, torch.arange(x.shape[1], device=x.device)  # where the first instruction stands
        start = 0 if cached is None else 2 + 2 * cached
        position = torch.cat([slots[start:first], slots[first::2]])  # (t,)
        earlier, own = slots <= position[:, None], slots == position[:, None]  # (t, 2 m)
        x = self.backbone(x[:, position], cache, position, x.shape[1], earlier & ((slots < first) | own))
        logits: Tensor = self.head(x[:, known - order.shape[1] :])
        return logits
