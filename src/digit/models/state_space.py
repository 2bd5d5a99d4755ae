"""A stack of Mamba-2 blocks: the backbone of a prior that is no transformer.

Instead of a cache that grows with the sequence, a block keeps a state h of fixed size. In each head, with P channels of
the input x and a state of N x P numbers (all of B, C, x and the step size dt depend on the input, A < 0 and D do not):

    h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t^T
    y_t = C_t^T h_t + D x_t

Sampling follows these equations, a token a step. Training and prefill compute all places at once, as masked attention
whose weights are C_t^T B_s exp(dt_(s+1) A + ... + dt_t A), in one piece: time grows with the square of the length,
which is less than the rest of a block for the few hundred tokens of an image.

Source: Dao & Gu 2024, arXiv 2405.21060 (Mamba-2), sections 5 to 7, with one group of B and C for all heads; layout and
random weights as in state-spaces/mamba (Mamba2). Its CUDA kernels are not used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from digit.core.config import PositiveInt, Probability, config
from digit.models.transformer import Stack


@config
class StateSpaceConfig:
    """The shape of a stack of Mamba-2 blocks.

    Attributes:
        dim: width D.
        depth: number of blocks L.
        state_dim: numbers N that a head's state keeps of each channel.
        head_dim: channels P of a head; it must divide the inner width.
        expand: the inner width E is ``expand`` x D.
        conv_width: tokens that the convolution before the recurrence sees.
        dropout: after the embedding sum and each block.
    """

    dim: PositiveInt
    depth: PositiveInt
    state_dim: PositiveInt = 64
    head_dim: PositiveInt = 64
    expand: PositiveInt = 2
    conv_width: PositiveInt = 4
    dropout: Probability = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.inner_dim % self.head_dim:
            raise ValueError(f"head_dim={self.head_dim} does not divide expand x dim = {self.inner_dim}")

    @property
    def inner_dim(self) -> int:
        """Channels E of the recurrence."""
        return self.expand * self.dim

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.inner_dim // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: those of x, B and C."""
        return self.inner_dim + 2 * self.state_dim

    def describe(self) -> str:
        """Depth, width, heads and state in a few words."""
        blocks, heads = ("" if n == 1 else "s" for n in (self.depth, self.heads))
        shape = f"{self.depth} Mamba-2 block{blocks} of width {self.dim}"
        return f"{shape}, {self.heads} head{heads} with a state of {self.state_dim} x {self.head_dim}"

    def flops(self, positions: int) -> int:
        """FLOPs of the matrix products of a forward pass over so many positions, what causality hides not counted."""
        projections = 2 * self.dim * (self.inner_dim + self.conv_dim + self.heads) + 2 * self.inner_dim * self.dim
        return positions * self.depth * (projections + positions * (self.state_dim + self.inner_dim))

    def cache_numbers(self, _positions: int) -> int:
        """Numbers that sampling keeps of a sequence, however long."""
        return self.depth * (self.state_dim * self.inner_dim + (self.conv_width - 1) * self.conv_dim)


class StateCache:
    """The last ``inputs`` of every block's convolution (B, conv_width - 1, conv_dim), and its ``states`` (B, H, P, N),
    in float32 at least, for what is added is often far smaller than the sum.
    """

    def __init__(self, config: StateSpaceConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> None:
        window, state = (config.conv_width - 1, config.conv_dim), (config.heads, config.head_dim, config.state_dim)
        wide = torch.promote_types(dtype, torch.float32)
        self.inputs = [torch.zeros(batch, *window, device=device, dtype=dtype) for _ in range(config.depth)]
        self.states = [torch.zeros(batch, *state, device=device, dtype=wide) for _ in range(config.depth)]

    def rows(self, start: int, stop: int) -> StateCache:
        """The cache of sequences ``start`` to ``stop``: a view, what is written there is written here."""
        view = object.__new__(StateCache)
        view.inputs, view.states = [t[start:stop] for t in self.inputs], [t[start:stop] for t in self.states]
        return view

    def clear(self) -> None:
        """Begin new sequences."""
        for tensor in (*self.inputs, *self.states):
            tensor.zero_()


class StateSlot(NamedTuple):
    """Where a block finds its part of a :class:`StateCache`, and writes it."""

    inputs: Tensor
    state: Tensor


def scan(
    x: Float[Tensor, "B T H P"],
    log_decay: Float[Tensor, "B T H"],
    b: Float[Tensor, "B T N"],
    c: Float[Tensor, "B T N"],
    state: Float[Tensor, "B H P N"] | None = None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"] | None]:
    """The recurrence h_t = exp(log_decay_t) h_(t-1) + b_t x_t^T, y_t = c_t^T h_t, for all places at once: y, and the
    state after the last place, None where none was given.

    Args:
        x: the inputs times dt.
        log_decay: dt A, in float32 at least.
        state: before the first place; None is zeros.
    """
    along = log_decay.cumsum(1).transpose(1, 2)  # (B, H, T)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    decay = (along[..., None] - along[..., None, :]).masked_fill(later, -math.inf).exp()  # (B, H, T, T)
    x = x.transpose(1, 2)  # (B, H, T, P)
    y = ((c @ b.mT)[:, None] * decay).to(x.dtype) @ x
    if state is None:
        return y.transpose(1, 2), None
    y = y + (c[:, None].to(state.dtype) @ state.mT * along.exp()[..., None]).to(x.dtype)
    left = (along[..., -1:] - along).exp()[..., None]  # (B, H, T, 1)
    state = along[..., -1:, None].exp() * state + (x * left).mT @ b[:, None].to(left.dtype)
    return y.transpose(1, 2), state


class StateSpaceBlock(nn.Module):
    """A norm and the Mamba-2 mixer, with its residual."""

    def __init__(self, config: StateSpaceConfig) -> None:
        super().__init__()
        self.config = c = config
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.inner = nn.Linear(c.dim, c.inner_dim + c.conv_dim + c.heads, bias=False)  # gate; x, B, C; dt
        self.conv = nn.Parameter(torch.empty(c.conv_width, c.conv_dim))  # one filter a channel
        self.conv_bias = nn.Parameter(torch.zeros(c.conv_dim))
        self.dt_bias = nn.Parameter(torch.zeros(c.heads))
        self.a_log = nn.Parameter(torch.zeros(c.heads))  # A = -exp(a_log)
        self.d = nn.Parameter(torch.ones(c.heads))
        self.gated_norm = nn.RMSNorm(c.inner_dim, eps=c.norm_eps)
        self.out = nn.Linear(c.inner_dim, c.dim, bias=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Float[Tensor, "B T D"], slot: StateSlot | None = None) -> Float[Tensor, "B T D"]:
        """With a ``slot`` the inputs follow what its state has seen, and are added to it."""
        c = self.config
        gate, mixed, dt = torch.split(self.inner(self.norm(x)), [c.inner_dim, c.conv_dim, c.heads], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # (B, T, H)
        log_decay = -self.a_log.to(wide).exp() * dt
        u, b, read = torch.split(self._convolve(mixed, slot), [c.inner_dim, c.state_dim, c.state_dim], dim=-1)
        u = u.reshape(*x.shape[:2], c.heads, c.head_dim)  # (B, T, H, P)
        v = u * dt.to(u.dtype)[..., None]
        if slot is not None and x.shape[1] == 1:  # the recurrence itself
            slot.state.mul_(log_decay[:, 0, :, None, None].exp()).addcmul_(v[:, 0, ..., None], b[:, :, None])
            y = (slot.state @ read[:, 0, None, :, None].to(slot.state.dtype))[..., 0][:, None].to(u.dtype)
        else:
            y, state = scan(v, log_decay, b, read, None if slot is None else slot.state)
            if slot is not None and state is not None:
                slot.state.copy_(state)
        y = (y + self.d.to(u.dtype)[:, None] * u).flatten(2)  # (B, T, E)
        gated = (y * F.silu(gate)).to(self.gated_norm.weight.dtype)
        added: Tensor = x + self.dropout(self.out(self.gated_norm(gated)))
        return added

    def _convolve(self, x: Tensor, slot: StateSlot | None) -> Tensor:
        """Each channel with its filter over its last inputs, (B, T, conv_dim)."""
        before, length = len(self.conv) - 1, x.shape[1]
        if slot is None:
            x = F.pad(x, (0, 0, before, 0))
        else:
            x = torch.cat([slot.inputs.to(x.dtype), x], dim=1)
            slot.inputs.copy_(x[:, length:])
        taps = [x[:, i : i + length] * weight for i, weight in enumerate(self.conv.to(x.dtype))]
        return F.silu(sum(taps, self.conv_bias.to(x.dtype)))


class StateSpace(Stack):
    """A stack of Mamba-2 blocks, with the interface of :class:`~digit.models.transformer.Transformer`."""

    def __init__(self, config: StateSpaceConfig) -> None:
        norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        super().__init__((StateSpaceBlock(config) for _ in range(config.depth)), norm, config.dropout)
        self.config = config

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cache: StateCache | None = None,
        _position: Int[Tensor, "*T"] | None = None,
        _kv_len: int | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Map embeddings to the last, normed states; with a cache they follow what it has seen, wherever that was."""
        slots = None
        if cache is not None:
            slots = [StateSlot(*parts) for parts in zip(cache.inputs, cache.states, strict=True)]
        return self.run(x, slots)


def init_as_mamba(network: StateSpace) -> None:
    """Initialise blocks as state-spaces/mamba does: PyTorch's default for matrices and filters, that of the output over
    sqrt(L); A uniform in [-16, -1]; the bias of dt so that dt is log-uniform in [0.001, 0.1].
    """
    for block in network.blocks:
        if isinstance(block, StateSpaceBlock):
            block.inner.reset_parameters()
            block.out.reset_parameters()
            with torch.no_grad():
                block.out.weight /= math.sqrt(network.config.depth)
                for filters in (block.conv, block.conv_bias):
                    nn.init.uniform_(filters, -(network.config.conv_width**-0.5), network.config.conv_width**-0.5)
                block.a_log.uniform_(1, 16).log_()
                dt = block.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp()
                block.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus, backwards
