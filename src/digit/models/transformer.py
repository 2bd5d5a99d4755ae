"""The one transformer of every role: causal or not, norm before or after, with or without a KV cache.

It sees vectors alone; tokens, positions and classes belong to :mod:`digit.models.token_model`. The arithmetic is that
of the published checkpoints (fairseq 0.12.2, DAMO-NLP-SG/DiGIT at cd6d8ca): biases everywhere, exact GELU.

Sources: Vaswani et al. 2017, section 3 (post-norm); Xiong et al. 2020, arXiv 2002.04745 (pre-norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from digit.core.config import PositiveInt, Probability, config


@config
class TransformerConfig:
    """The shape of a transformer.

    Attributes:
        dim: width D; ``heads`` must divide it.
        depth: number of blocks L.
        ffn_dim: hidden width of the feed-forward layers; 4 x dim when None.
        norm: "pre" (norm inside the residual branch, and one after the last block) or "post" (after the sum, none at
            the end).
        causal: each position sees itself and what is before it; False sees everything.
        dropout: after the embedding sum, the attention output and the feed-forward output.
    """

    dim: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    ffn_dim: PositiveInt | None = None
    norm: Literal["pre", "post"] = "pre"
    causal: bool = True
    dropout: Probability = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} does not divide dim={self.dim}")

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.dim // self.heads

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the feed-forward layers."""
        return self.ffn_dim or 4 * self.dim

    def describe(self) -> str:
        """Depth, width and heads in a few words."""
        blocks, heads = ("" if n == 1 else "s" for n in (self.depth, self.heads))
        return f"{self.depth} block{blocks} of width {self.dim}, {self.heads} head{heads}"

    def flops(self, positions: int) -> int:
        """FLOPs of the matrix products of a forward pass over so many positions; causal attention counts half."""
        attention = 4 * positions * self.dim // (2 if self.causal else 1)
        return positions * self.depth * (8 * self.dim * self.dim + 4 * self.dim * self.hidden_dim + attention)

    def cache_numbers(self, positions: int) -> int:
        """Numbers that sampling keeps of a sequence: keys and values of every block."""
        return 2 * self.depth * positions * self.dim


class KVCache:
    """Keys and values (B, H, T, d) of every block for at most T positions, allocated once and filled in place."""

    def __init__(
        self, config: TransformerConfig, batch: int, length: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.heads, length, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)]

    @property
    def length(self) -> int:
        """How many positions fit, T."""
        return self.keys[0].shape[2]

    def rows(self, start: int, stop: int) -> KVCache:
        """The cache of sequences ``start`` to ``stop``: a view, what is written there is written here."""
        view = object.__new__(KVCache)
        view.keys, view.values = [k[start:stop] for k in self.keys], [v[start:stop] for v in self.values]
        return view

    def clear(self) -> None:
        """Begin new sequences. Nothing is done: no position is read before it is written anew."""

    def copy_from(self, other: KVCache, count: int) -> None:
        """Take over the first ``count`` positions of another cache of the same batch."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:, :, :count] = theirs[:, :, :count]


class KVSlot(NamedTuple):
    """Where a block finds its cache: ``keys``, ``values`` (B, H, T, d); where its inputs stand in it: ``position`` (t,)
    int64; and which of the first S positions each of them attends to: ``visible`` (t, S) bool.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    visible: Tensor


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "B T D"], slot: KVSlot | None = None) -> Float[Tensor, "B T D"]:
        """With a ``slot`` the inputs are added to its cache and see what is in it."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)  # 3 of (B, H, T, d)
        if slot is None:
            y = _attend(q, k, v, self.causal)  # (B, H, T, d)
        else:
            slot.keys.index_copy_(2, slot.position, k.to(slot.keys.dtype))
            slot.values.index_copy_(2, slot.position, v.to(slot.values.dtype))
            kv_len = slot.visible.shape[1]
            keys, values = slot.keys[:, :, :kv_len].to(q.dtype), slot.values[:, :, :kv_len].to(q.dtype)  # (B, H, S, d)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=slot.visible)  # (B, H, T, d)
        projected: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return projected


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention (B, H, T, d) among the positions of a sequence."""
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # PyTorch's backward pass on CPUs takes 2 (320 positions) to 8 times (64) as long in bfloat16
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal).to(q.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each with its residual and its norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.ffn_in = nn.Linear(config.dim, config.hidden_dim)
        self.ffn_out = nn.Linear(config.hidden_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B T D"], slot: KVSlot | None = None) -> Float[Tensor, "B T D"]:
        """See :meth:`Attention.forward`."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), slot))
            added: Tensor = x + self.dropout(self._ffn(self.ffn_norm(x)))
            return added
        x = self.attention_norm(x + self.dropout(self.attention(x, slot)))
        normed: Tensor = self.ffn_norm(x + self.dropout(self._ffn(x)))
        return normed

    def _ffn(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.ffn_out(F.gelu(self.ffn_in(x)))
        return hidden


class Stack(nn.Module):
    """Dropout, blocks and a norm over vectors (B, T, D): what every backbone has."""

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.checkpointing = False  # recompute activations in the backward pass: less memory, a third more time
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def run(self, x: Float[Tensor, "B T D"], slots: Sequence[Any] | None) -> Float[Tensor, "B T D"]:
        """The last, normed states; each block with its part of a cache, if there is one."""
        x = self.dropout(x)
        for block, slot in zip(self.blocks, slots or [None] * len(self.blocks), strict=True):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x, slot)
        out: Tensor = self.norm(x)
        return out

    def states(self, x: Float[Tensor, "B T D"]) -> list[Tensor]:
        """The input and every block's output, L + 1 tensors (B, T, D), before the final norm: for a linear probe."""
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states


class Transformer(Stack):
    """A stack of attention blocks."""

    def __init__(self, config: TransformerConfig) -> None:
        norm = nn.LayerNorm(config.dim, eps=config.norm_eps) if config.norm == "pre" else nn.Identity()
        super().__init__((Block(config) for _ in range(config.depth)), norm, config.dropout)
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cache: KVCache | None = None,
        position: Int[Tensor, "*T"] | None = None,
        kv_len: int | None = None,
        visible: Bool[Tensor, "T S"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Map embeddings to the last, normed states.

        Args:
            cache: is filled at ``position``, and everything in it up to each input is attended to.
            position: () or (T,), where the inputs stand in the cache.
            kv_len: how many positions of the cache are read: more than the last position; all by default.
            visible: which of these each input attends to, instead of all up to it.
        """
        slots = None
        if cache is not None and position is not None:
            position = position.view(-1)  # (T,)
            if visible is None:
                visible = torch.arange(kv_len or cache.length, device=x.device) <= position[:, None]  # (T, S)
            slots = [KVSlot(k, v, position, visible) for k, v in zip(cache.keys, cache.values, strict=True)]
        return self.run(x, slots)


def init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and tables, zero for biases (GPT-2's choice); norms keep ones and zeros."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def init_as_fairseq(transformer: Transformer) -> None:
    """Initialise blocks as the paper's code does (fairseq 0.12.2 at DAMO-NLP-SG/DiGIT cd6d8ca).

    Queries, keys and values: uniform, Xavier with gain 1 / sqrt(2), that is up to sqrt(1.5 / D). The output projection:
    uniform up to sqrt(3 / D), without bias at first. Feed-forward layers, and the biases of queries, keys and values:
    PyTorch's default, uniform up to 1 / sqrt(inputs).
    """
    for part in transformer.modules():  # as constructed: what is not named here has PyTorch's default already
        if isinstance(part, Attention):
            nn.init.xavier_uniform_(part.qkv.weight)  # (3 D, D): the bound is sqrt(6 / 4 D), as said above
            nn.init.xavier_uniform_(part.out.weight)
            nn.init.zeros_(part.out.bias)
