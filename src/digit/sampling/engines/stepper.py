"""One token for a whole batch: everything that a step reads and writes lies in buffers that are allocated once.

A step feeds the last token, runs the network against the cache, guides, filters, draws, writes the token and moves on,
without a word from the host. So it can be compiled as a whole, and on CUDA recorded once and replayed.
"""

from __future__ import annotations

import functools
import logging
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from digit.models.token_model import NO_LABEL, TokenModel
from digit.models.transformer import KVCache
from digit.sampling.batching import is_out_of_memory
from digit.sampling.engines.native import NativeStep, fast_draw
from digit.sampling.engines.quantize import quantized
from digit.sampling.guidance import guide
from digit.sampling.logits import Knobs, draw
from digit.sampling.settings import SamplingSettings

log = logging.getLogger("digit")

GRAPH_STRIDE = 128
"""A recorded step has a fixed reach into the cache: the next multiple of this. Fewer recordings against less
reading."""


class State(NamedTuple):
    """What a step reads and writes besides the cache.

    Attributes:
        tokens: (B, length) int64; known ones, and where to write.
        free: (B, length) bool, True where to sample; other tokens stay.
        uniform: (B, length) float32 in [0, 1).
        scale: (length,) float32, guidance at each token.
        place: () int64, the token to draw next.
        temperature, top_p: () float32.
    """

    tokens: Tensor
    free: Tensor
    uniform: Tensor
    scale: Tensor
    place: Tensor
    temperature: Tensor
    top_p: Tensor


def advance(model: TokenModel, cache: KVCache, state: State, places: Tensor, guided: bool, knobs: Knobs) -> None:
    """Draw token ``state.place`` and add 1 to it.

    Args:
        model: the network.
        cache: of B sequences, or of 2B when guided: with labels first, without after them.
        state: see there.
        places: any tensor (S,): how far into the cache the step reads. A tensor, because compilers take sizes as
            unknowns more readily than numbers.
        guided: whether both halves run.
        knobs: of the draw.
    """
    index = state.place.view(1)
    token = state.tokens.index_select(1, index - 1).squeeze(1)  # (B,)
    token = torch.cat([token, token]) if guided else token
    logits = model.step(cache, token, state.place - 1, places.shape[0])  # (B or 2B, V)
    write(state, logits, guided, knobs)
    state.place.add_(1)


def write(state: State, logits: Tensor, guided: bool, knobs: Knobs) -> None:
    """Draw token ``state.place`` from logits (B, V), or (2B, V) when guided, where it is free."""
    index = state.place.view(1)
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, state.scale.index_select(0, index))
    drawn = draw(logits, state.uniform.index_select(1, index).squeeze(1), knobs)[:, None]  # (B, 1)
    kept = state.tokens.index_select(1, index)
    state.tokens.index_copy_(1, index, torch.where(state.free.index_select(1, index), drawn, kept))


class Stepper:
    """The cache, the buffers and the ready-made steps of one model and batch size.

    Attributes:
        state: the buffers; a batch smaller than them leaves the last rows idle.
        cache: of 2 * batch sequences when guidance is prepared, else of batch.
        native: the C++ step, where that runs.
        compile_seconds: spent on compiling and recording so far.
    """

    def __init__(
        self,
        model: TokenModel,
        batch: int,
        guided: bool,
        compile: bool = False,
        quantize: str | None = None,
        graphs: bool = False,
        native: NativeStep | None = None,
    ) -> None:
        device, length = model.start.device, model.config.length
        self.batch, self.guided = batch, guided
        self.native, self.compiled, self.no_compiler = native, compile and native is None, False
        self.graphs = graphs and device.type == "cuda"
        self.reach = model.config.prefix_length + length
        # one position more than is ever read: a slice that might be the whole would be compiled twice
        self.cache = KVCache(
            model.config.transformer, 2 * batch if guided else batch, self.reach + 1, device, model.start.dtype
        )
        self._with_labels = self.cache.rows(0, batch)
        self.state = State(
            tokens=torch.zeros(batch, length, dtype=torch.long, device=device),
            free=torch.ones(batch, length, dtype=torch.bool, device=device),
            uniform=torch.zeros(batch, length, device=device),
            scale=torch.ones(length, device=device),
            place=torch.zeros((), dtype=torch.long, device=device),
            temperature=torch.ones((), device=device),
            top_p=torch.ones((), device=device),
        )
        self.compile_seconds = 0.0
        self._weights = version(model)
        self._quantized = quantized(model) if quantize and native is None else None
        self._places = torch.arange(self.reach, device=device)
        self._step = _compiled() if self.compiled else advance
        self._ready: set[tuple[Any, ...]] = set()
        self._recorded: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        # recordings run one after the other and leave nothing but the buffers, so they may share their scratch memory
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None

    def fits(self, model: TokenModel, batch: int, guided: bool) -> bool:
        """Whether this stepper can take such a batch of such a model."""
        fixed = self.compiled or self.graphs  # made for one batch size: fill it up, rather than make another
        return (
            self._weights == version(model)
            and (self.guided or not guided)
            and (batch <= self.batch if fixed else batch == self.batch)
        )

    def begin(
        self, uniform: Tensor, tokens: Tensor, free: Tensor, scale: list[float], settings: SamplingSettings
    ) -> Knobs:
        """Fill the buffers for a batch; the knobs to step with."""
        n, state = len(uniform), self.state
        state.uniform[:n], state.tokens[:n], state.free[:n] = uniform, tokens, free
        state.scale.copy_(torch.tensor(scale))
        state.temperature.fill_(settings.temperature)
        state.top_p.fill_(settings.top_p)
        return Knobs(
            0.0 if settings.temperature == 0 else state.temperature,
            settings.top_k,
            1.0 if settings.top_p == 1 else state.top_p,
        )

    def start(
        self, model: TokenModel, known: int, labels: Tensor | None, prefix: Tensor | None, knobs: Knobs, guided: bool
    ) -> None:
        """Run what is known through the network and draw token ``known``."""
        b = self.batch
        self.state.place.fill_(known)
        logits = model.prefill(self._with_labels, b, labels, prefix, self.state.tokens[:, :known])  # (B, V)
        if guided:
            logits = torch.cat([logits, self.catch_up(model, known, prefix)])  # (2B, V)
        if self.native:
            self._write(logits, known, knobs, guided)
        else:
            write(self.state, logits, guided, knobs)
        self.state.place.add_(1)

    def catch_up(self, model: TokenModel, known: int, prefix: Tensor | None) -> Tensor:
        """Fill the unguided half of the cache with ``known`` tokens in one pass; its logits (B, V) of the next token.

        A prefix stands before the label and cannot see it, so both halves share its keys and values: they are copied.
        """
        b, without = self.batch, self.cache.rows(self.batch, 2 * self.batch)
        if prefix is not None:
            without.copy_from(self._with_labels, prefix.shape[1])
        labels = torch.full((b,), NO_LABEL, device=self.state.place.device)
        return model.prefill(without, b, labels, prefix, self.state.tokens[:, :known], prefix_cached=prefix is not None)

    def step(self, model: TokenModel, index: int, knobs: Knobs, guided: bool) -> None:
        """Draw token ``index``, the one that ``state.place`` points to."""
        if self.native:
            self._native_step(self.native, index, knobs, guided)
            return
        network = self._quantized or model
        cache = self.cache if guided else self._with_labels
        reach = model.config.prefix_length + index + 1
        if self.graphs:
            reach = min(self.reach, -(-reach // GRAPH_STRIDE) * GRAPH_STRIDE)
        places = self._places[:reach]
        arguments = (network, cache, self.state, places, guided, knobs)
        variant = (guided, knobs.top_k, *(isinstance(k, Tensor) for k in knobs))  # what a step is compiled for
        if self.graphs:
            self._replay((reach, *variant), arguments)
        elif self.compiled and variant not in self._ready:
            self._timed(lambda: self._first(*arguments))
            self._ready.add(variant)
        else:
            self._step(*arguments)

    def _native_step(self, network: NativeStep, index: int, knobs: Knobs, guided: bool) -> None:
        """:func:`advance` in C++. The host knows where it is, which spares looking up places by tensors."""
        token = self.state.tokens[:, index - 1]  # (B,)
        cache, token = (self.cache, torch.cat([token, token])) if guided else (self._with_labels, token)
        self._write(network.step(cache, token, index - 1), index, knobs, guided)
        self.state.place.add_(1)

    def _write(self, logits: Tensor, index: int, knobs: Knobs, guided: bool) -> None:
        """:func:`write` in C++."""
        state = self.state
        logits, unguided = logits.chunk(2) if guided else (logits, None)  # (B, V)
        drawn = fast_draw(logits, state.uniform[:, index], knobs, unguided, float(state.scale[index]))  # (B,)
        state.tokens[:, index] = torch.where(state.free[:, index], drawn, state.tokens[:, index])

    def _first(self, *arguments: Any) -> None:
        """A first step, which compiles; where that fails, the plain step does the same work from now on."""
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(arguments[3], 0)  # one compilation for every reach
        try:
            with _compiler_options(self.state.place.device):
                self._step(*arguments)
        except Exception as error:
            if not self.compiled or is_out_of_memory(error):
                raise
            _say_once(str(error).strip().split("\n")[0])
            self.compiled, self.no_compiler, self._step = False, True, advance
            self._step(*arguments)

    def _replay(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        if key not in self._recorded:
            self._timed(lambda: self._record(key, arguments))
        self._recorded[key].replay()

    def _record(self, key: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Record a step as a CUDA graph. Warm-up steps repeat the same token, so the index is set back after each."""
        index = self.state.place.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._first(*arguments)
                self.state.place.copy_(index)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # recorded, not run
            self._step(*arguments)
        self._recorded[key] = graph

    def _timed(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self.compile_seconds += time.perf_counter() - began


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("Sampling runs uncompiled, slower and with the same results: no compiler could be used (%s).", reason)


def _compiled() -> Callable[..., None]:
    """A compiled :func:`advance` of its own: the compiler limits how many variants one function may have."""
    own = types.FunctionType(advance.__code__.replace(), advance.__globals__, "advance")
    step: Callable[..., None] = torch.compile(own, fullgraph=True)
    return step


def _compiler_options(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU the weights become constants, packed as its matrix products like them; changed weights get another
    stepper.
    """
    wanted = {"freezing": device.type == "cpu", "size_asserts": False, "alignment_asserts": False}
    known = {name: value for name, value in wanted.items() if hasattr(torch._inductor.config, name)}
    context: AbstractContextManager[Any] = torch._inductor.config.patch(known)
    return context


def version(model: TokenModel) -> tuple[Any, ...]:
    """Changes when the weights move, change their format or are written to, and between training and use."""
    parameters = list(model.parameters())
    first, writes = parameters[0], sum(0 if p.is_inference() else p._version for p in parameters)
    return first.device, first.dtype, first.data_ptr(), writes, model.training
