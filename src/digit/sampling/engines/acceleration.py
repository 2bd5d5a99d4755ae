"""How fast a model samples: which engine runs, narrow weights, and what is kept for it between calls.

| device | engine |
|---|---|
| CPU | C++, where it covers the model, there is a compiler for it, and a few steps of it were quicker than plain ones |
| CPU otherwise | compiled by torch.compile if asked for, else plain |
| CUDA | the same, recorded as CUDA graphs |
| others | compiled if asked for, else plain |

State-space models run plain everywhere: a step changes their state, so it must not be repeated, as a recording does.

Masked and random-order models take few and large steps: they run in plain PyTorch whatever is chosen, without an engine
(:mod:`digit.sampling.masked`, :mod:`digit.sampling.random_order`).

Speed belongs to a loaded model, not to a call: :func:`accelerate` it once, and every later
:func:`digit.sampling.sample` uses it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from digit.core.errors import DigitError
from digit.models.token_model import TokenModel
from digit.native import NoCompiler
from digit.sampling.engines.choice import measured
from digit.sampling.engines.decode import (
    CompiledCudaGraphEngine,
    CompiledEngine,
    CudaGraphEngine,
    DecodeEngine,
    version,
)
from digit.sampling.engines.native import NativeEngine, NativeStep, suits

log = logging.getLogger("digit")


class Acceleration(NamedTuple):
    """How a model samples.

    Attributes:
        compile: build one fused step with torch.compile where C++ does not run: half a minute or so for every batch
            size.
        quantize: "int8" stores the step's matrices in 8 bits, a scale a row; a step on a CPU reads a quarter of the
            bytes. Tokens change slightly.
        native: on a CPU, run the C++ step (a few seconds of building once for all models and times): None where it is
            the quicker, measured at the first use of a shape; True wherever it can; False never.
    """

    compile: bool = False
    quantize: str | None = None
    native: bool | None = None


class EngineCache:
    """What is kept for one model: its options, its packed weights, and the engine of the last batch shape."""

    def __init__(self, options: Acceleration) -> None:
        self.options = options
        self.lock = threading.RLock()  # one batch at a time: the engine is shared between calls
        self.engine: DecodeEngine | None = None
        self.packed: tuple[object, NativeStep] | None = None  # the version of the weights, and those

    def engine_for(self, model: TokenModel, batch: int, guided: bool) -> DecodeEngine:
        """An engine with room for the batch: the one at hand if it fits, else a new one in its place."""
        if self.engine is None or not self.engine.fits(model, batch, guided):
            if isinstance(self.engine, CompiledEngine) and self.engine.failed:  # do not try again
                self.options = self.options._replace(compile=False)
            self.engine = None  # the memory of the old one first
            self.engine = self._choose(model, batch, guided)
        return self.engine

    def _choose(self, model: TokenModel, batch: int, guided: bool) -> DecodeEngine:
        """The quickest engine that the options allow and that can run here."""
        options = self.options
        if model.config.state_space is not None:
            return DecodeEngine(model, batch, guided, options.quantize)
        if options.native is not False and suits(model):
            native = functools.partial(self._native, model, batch, guided, time.perf_counter())
            try:
                if options.native or self._native_is_quicker(model, batch, guided, native):
                    return native()
            except NoCompiler as reason:
                log.info("The C++ step could not be built, so a slower one runs: %s.", reason)
                self.options = options._replace(native=False)
            self.packed = None
        kinds = (CompiledEngine, CompiledCudaGraphEngine) if options.compile else (DecodeEngine, CudaGraphEngine)
        return kinds[model.start.device.type == "cuda"](model, batch, guided, options.quantize)

    def _native(self, model: TokenModel, batch: int, guided: bool, began: float) -> NativeEngine:
        """The engine in C++; its weights are packed once for every batch size. It has been in the making since
        ``began``.
        """
        if self.packed is None or self.packed[0] != version(model):
            self.packed = None  # the memory of the old ones first
            self.packed = version(model), NativeStep(model, self.options.quantize)
        return NativeEngine(model, batch, guided, self.packed[1], time.perf_counter() - began)

    def _native_is_quicker(
        self, model: TokenModel, batch: int, guided: bool, native: Callable[[], DecodeEngine]
    ) -> bool:
        quantize = self.options.quantize
        plain = functools.partial(DecodeEngine, model, batch, guided, quantize)
        found = measured(model, batch, guided, quantize, {"C++": native, "plain": plain})
        if found["C++"] <= found["plain"]:
            return True
        slower = f"{1e3 * found['C++']:.2f} ms a step against {1e3 * found['plain']:.2f}"
        log.info("The C++ step is slower than PyTorch's on this processor for this shape (%s), so that runs.", slower)
        return False


_caches: WeakKeyDictionary[TokenModel, EngineCache] = WeakKeyDictionary()


def accelerate(
    model: TokenModel, compile: bool = False, quantize: str | None = None, native: bool | None = None
) -> None:
    """Choose how ``model`` samples from now on; see :class:`Acceleration`. A DigitError for an unknown kind of
    quantization, or one that this device has no fast kernel for.
    """
    if quantize not in (None, "int8"):
        raise DigitError(f"quantize = {quantize} was given; expected int8, or nothing.")
    if quantize and model.start.device.type != "cpu":
        raise DigitError(
            f"quantize = {quantize} was given for {model.start.device.type}; int8 is for the CPU. Use --dtype bf16."
        )
    options = Acceleration(compile, quantize, native)
    if engine_cache(model).options != options:
        _caches[model] = EngineCache(options)


def engine_cache(model: TokenModel) -> EngineCache:
    """What is kept for a model."""
    return _caches.setdefault(model, EngineCache(Acceleration()))


def release(*models: TokenModel) -> None:
    """Free the caches, packed weights and compiled steps kept for models; their options stay."""
    for model in models:
        cache = engine_cache(model)
        cache.engine = cache.packed = None


def compile_seconds(model: TokenModel) -> float:
    """Seconds that building, compiling and recording took for the engine at hand, which no later step needs."""
    engine = engine_cache(model).engine
    return 0.0 if engine is None else engine.setup_seconds


def engine_name(model: TokenModel) -> str:
    """What the model last sampled with: "C++", "compiled" or "plain" (on CUDA as graphs); "" if it has not."""
    engine = engine_cache(model).engine
    return "" if engine is None else engine.name
