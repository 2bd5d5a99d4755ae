"""One token for a whole batch: everything that a step reads and writes lies in buffers that are allocated once.

A step feeds the last token, runs the network against the cache, guides, filters, draws, writes the token and moves on,
without a word from the host. So it can be compiled as a whole, and on CUDA recorded once and replayed.

| engine | a step |
|---|---|
| :class:`DecodeEngine` | plain PyTorch |
| :class:`CompiledEngine` | compiled by torch.compile as a whole |
| :class:`CudaGraphEngine`, :class:`CompiledCudaGraphEngine` | the same, recorded as CUDA graphs and replayed |
| :class:`~digit.sampling.engines.native.NativeEngine` | in C++, on a CPU |
"""

from __future__ import annotations

import copy
import functools
import logging
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.token_model import NO_LABEL, Cache, Labels, Prefix, TokenModel
from digit.sampling.batching import is_out_of_memory
from digit.sampling.logits import DrawParams, draw, guide
from digit.sampling.request import SamplingParams

log = logging.getLogger("digit")

GRAPH_STRIDE = 128
"""A recorded step reads a fixed length of the cache: the next multiple of this. Fewer recordings against less
reading."""


class State(NamedTuple):
    """What a step reads and writes besides the cache.

    Attributes:
        tokens: (B, length) int64; known ones, and where to write.
        free: (B, length) bool, True where to sample; other tokens stay.
        uniform: (B, length) float32 in [0, 1).
        scale: (length,) float32, guidance at each token.
        first: (length,) int64, the id of a token's first logit; not 0 for the deeper tokens of a residual codebook.
        place: () int64, the token to draw next.
        temperature, top_p: () float32.
    """

    tokens: Tensor
    free: Tensor
    uniform: Tensor
    scale: Tensor
    first: Tensor
    place: Tensor
    temperature: Tensor
    top_p: Tensor


def decode_one_token(
    model: TokenModel, cache: Cache, state: State, places: Tensor, guided: bool, params: DrawParams
) -> None:
    """Draw token ``state.place`` and add 1 to it.

    ``cache`` is of B sequences, or of 2B when guided: with labels first, without after them. ``places`` is any tensor
    (S,): how far into the cache the step reads. A tensor, because compilers take sizes as unknowns more readily than
    numbers.
    """
    index = state.place.view(1)
    token = state.tokens.index_select(1, index - 1).squeeze(1)  # (B,)
    token = torch.cat([token, token]) if guided else token
    logits = model.step(cache, token, state.place - 1, places.shape[0])  # (B or 2B, V)
    write_token(state, logits, guided, params)
    state.place.add_(1)


def write_token(state: State, logits: Tensor, guided: bool, params: DrawParams) -> None:
    """Draw token ``state.place`` from logits (B, V), or (2B, V) when guided, where it is free."""
    index = state.place.view(1)
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, state.scale.index_select(0, index))
    drawn = draw(logits, state.uniform.index_select(1, index).squeeze(1), params)[:, None]  # (B, 1)
    drawn = drawn + state.first.index_select(0, index)
    kept = state.tokens.index_select(1, index)
    state.tokens.index_copy_(1, index, torch.where(state.free.index_select(1, index), drawn, kept))


class DecodeEngine:
    """The cache, the buffers and the step of one model and batch size; this one's step is plain PyTorch.

    Attributes:
        fixed_batch: made for one batch size: a smaller batch fills it up, rather than make another.
        state: the buffers; a batch smaller than them leaves the last rows idle.
        cache: of 2 * batch sequences when guidance is prepared, else of batch.
    """

    name = "plain"
    fixed_batch = False

    def __init__(self, model: TokenModel, batch: int, guided: bool, quantize: str | None = None) -> None:
        device, length = model.start.device, model.config.length
        self.batch, self.guided, self.setup_seconds = batch, guided, 0.0
        self.max_kv_len = model.config.prefix_length + length
        # one position more than is ever read: a slice that might be the whole would be compiled twice
        self.cache: Any = model.new_cache(2 * batch if guided else batch, spare=1)
        self._with_labels: Any = self.cache.rows(0, batch)
        self.state = State(
            tokens=torch.zeros(batch, length, dtype=torch.long, device=device),
            free=torch.ones(batch, length, dtype=torch.bool, device=device),
            uniform=torch.zeros(batch, length, device=device),
            scale=torch.ones(length, device=device),
            first=torch.arange(length, device=device) % model.config.codebook_depth * model.config.codes,
            place=torch.zeros((), dtype=torch.long, device=device),
            temperature=torch.ones((), device=device),
            top_p=torch.ones((), device=device),
        )
        self._weights = version(model)
        self._quantized = quantized(model) if quantize else None
        self._places = torch.arange(self.max_kv_len, device=device)
        self._step: Callable[..., None] = decode_one_token

    def fits(self, model: TokenModel, batch: int, guided: bool) -> bool:
        """Whether this engine can take such a batch of such a model."""
        room = batch <= self.batch if self.fixed_batch else batch == self.batch
        return room and self._weights == version(model) and (self.guided or not guided)

    def begin(
        self, uniform: Tensor, tokens: Tensor, free: Tensor, scale: list[float], params: SamplingParams
    ) -> DrawParams:
        """Fill the buffers for a batch; the parameters to step with."""
        n, state = len(uniform), self.state
        state.uniform[:n], state.tokens[:n], state.free[:n] = uniform, tokens, free
        state.scale.copy_(torch.tensor(scale))
        state.temperature.fill_(params.temperature)
        state.top_p.fill_(params.top_p)
        temperature = 0.0 if params.temperature == 0 else state.temperature
        return DrawParams(temperature, params.top_k, 1.0 if params.top_p == 1 else state.top_p)

    def prefill(
        self, model: TokenModel, known: int, labels: Labels, prefix: Prefix, params: DrawParams, guided: bool
    ) -> None:
        """Run what is known through the network and draw token ``known``."""
        self.state.place.fill_(known)
        logits = model.prefill(self._with_labels, self.batch, labels, prefix, self.state.tokens[:, :known])  # (B, V)
        if guided:
            logits = torch.cat([logits, self.catch_up(model, known, prefix)])  # (2B, V)
        self._write(logits, known, guided, params)
        self.state.place.add_(1)

    def catch_up(self, model: TokenModel, known: int, prefix: Prefix) -> Tensor:
        """Fill the unguided half of the cache with ``known`` tokens in one pass; its logits (B, V) of the next token.

        A prefix stands before the label and cannot see it, so both halves share its keys and values: they are copied.
        """
        b, without = self.batch, self.cache.rows(self.batch, 2 * self.batch)
        copied = prefix is not None and model.config.state_space is None  # a state has gone on to the label
        if copied:
            without.copy_from(self._with_labels, model.config.prefix_length)
        labels = torch.full((b,), NO_LABEL, device=self.state.place.device)
        return model.prefill(without, b, labels, prefix, self.state.tokens[:, :known], prefix_cached=copied)

    def decode_tokens(self, model: TokenModel, start: int, end: int, guided: bool, params: DrawParams) -> None:
        """Draw tokens ``start`` to ``end`` - 1, the first of which ``state.place`` points to."""
        for index in range(start, end):
            self.decode_one_token(model, index, guided, params)

    def decode_one_token(self, model: TokenModel, index: int, guided: bool, params: DrawParams) -> None:
        """Draw token ``index``, the one that ``state.place`` points to."""
        cache = self.cache if guided else self._with_labels
        places = self._places[: self._kv_len(model.config.prefix_length + index + 1)]
        # what a step is compiled for
        variant = (guided, params.top_k, *(isinstance(value, Tensor) for value in params))
        self._run(variant, (self._quantized or model, cache, self.state, places, guided, params))

    def _kv_len(self, needed: int) -> int:
        """How far into the cache a step reads that needs so many positions."""
        return needed

    def _run(self, _variant: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        self._step(*arguments)

    def _write(self, logits: Tensor, _index: int, guided: bool, params: DrawParams) -> None:
        write_token(self.state, logits, guided, params)


class CompiledEngine(DecodeEngine):
    """The step compiled, once for each variant; where that fails the plain step does the same work."""

    name = "compiled"
    fixed_batch = True
    failed = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # a function of its own: the compiler limits how many variants one function may have
        own = types.FunctionType(decode_one_token.__code__.replace(), decode_one_token.__globals__, "decode_one_token")
        self._step = torch.compile(own, fullgraph=True)
        self._ready: set[tuple[Any, ...]] = set()

    def _run(self, variant: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        if variant in self._ready:
            self._step(*arguments)
            return
        began = time.perf_counter()
        torch._dynamo.maybe_mark_dynamic(arguments[3], 0)  # one compilation for every length
        # on a CPU the weights become constants, packed as its products like them; changed weights get another engine
        wanted = {"freezing": self.state.place.device.type == "cpu", "size_asserts": False, "alignment_asserts": False}
        known = {name: value for name, value in wanted.items() if hasattr(torch._inductor.config, name)}
        try:
            with torch._inductor.config.patch(known):
                self._step(*arguments)
        except Exception as error:
            if self.failed or is_out_of_memory(error):
                raise
            _say_once(str(error).strip().split("\n")[0])
            self.failed, self.name, self._step = True, "plain", decode_one_token
            self._step(*arguments)
        self._ready.add(variant)
        self.setup_seconds += time.perf_counter() - began


class CudaGraphEngine(DecodeEngine):
    """The step of the class behind this one in the order of inheritance, recorded as CUDA graphs and replayed."""

    name = "plain as CUDA graphs"
    fixed_batch = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._recorded: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        # recordings run one after the other and leave nothing but the buffers, so they may share their scratch memory
        self._pool = torch.cuda.graph_pool_handle()

    def _kv_len(self, needed: int) -> int:
        return min(self.max_kv_len, -(-needed // GRAPH_STRIDE) * GRAPH_STRIDE)

    def _run(self, variant: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        key = (len(arguments[3]), *variant)
        if key not in self._recorded:
            before, began = self.setup_seconds, time.perf_counter()
            self._recorded[key] = self._record(variant, arguments)
            self.setup_seconds = before + time.perf_counter() - began
        self._recorded[key].replay()

    def _record(self, variant: tuple[Any, ...], arguments: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
        """Warm-up steps repeat the same token, so the index is set back after each."""
        index = self.state.place.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super()._run(variant, arguments)
                self.state.place.copy_(index)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # recorded, not run
            self._step(*arguments)
        return graph


class CompiledCudaGraphEngine(CudaGraphEngine, CompiledEngine):
    """The compiled step, recorded."""

    name = "compiled as CUDA graphs"


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("Sampling runs uncompiled, slower and with the same results: no compiler could be used (%s).", reason)


def version(model: TokenModel) -> tuple[Any, ...]:
    """Changes when the weights move, change their format or are written to, and between training and use."""
    parameters = list(model.parameters())
    first, writes = parameters[0], sum(0 if p.is_inference() else p._version for p in parameters)
    return first.device, first.dtype, first.data_ptr(), writes, model.training


class Int8Linear(nn.Module):
    """A matrix in 8 bits, of which a step on a CPU reads a quarter of the bytes; activations stay in floating point.

    ``weight`` (out, in) int8, rounded to nearest, and ``scale`` (out,) bfloat16, absolute maximum / 127: row i is
    weight[i] * scale[i]. PyTorch's kernel multiplies them in bfloat16; docs/performance.md says where it is faster.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w = linear.weight.detach().float()
        scale = (w.abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (w / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        flat = x.reshape(-1, x.shape[-1]).bfloat16()
        if any(side % 32 for side in self.weight.shape):  # PyTorch's kernel reads beyond the end of other shapes
            product: Tensor = F.linear(flat, self.weight.bfloat16()) * self.scale
        else:
            product = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
        y = product.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def quantized(model: TokenModel) -> TokenModel:
    """A copy of the model with int8 matrices in its blocks and head; all else is shared, not copied."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    narrow = copy.deepcopy(model, shared)
    for module in list(narrow.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return narrow
