"""How fast a model samples: which engine runs, narrow weights, and what is kept for it between calls.

| device | engine |
|---|---|
| CPU | C++, where it covers the model, there is a compiler for it, and a few steps of it were quicker than plain ones |
| CPU otherwise | compiled by torch.compile if asked for, else plain |
| CUDA | the same, recorded as CUDA graphs |
| others | compiled if asked for, else plain |

The compiler, the processor and the shape decide together whether the C++ step or the matrix library of PyTorch is
quicker, so a few steps of both are timed at the first use of a shape, and what was found lies beside the built C++.

State-space models run plain everywhere: a step changes their state, so it must not be repeated, as a recording does.

Masked and random-order models take few and large steps: they run in plain PyTorch whatever is chosen, without an engine
(:mod:`digit.sampling.masked`, :mod:`digit.sampling.random_order`).

Speed belongs to a loaded model, not to a call: :func:`accelerate` it once, and every later
:func:`digit.sampling.sample` uses it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from digit.core.environment import hardware
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.models.token_model import TokenModel
from digit.native import NoCompiler, library
from digit.sampling.engines.decode import (
    CompiledCudaGraphEngine,
    CompiledEngine,
    CudaGraphEngine,
    DecodeEngine,
    version,
)
from digit.sampling.engines.native import NativeEngine, NativeStep, suits
from digit.sampling.request import SamplingParams

log = logging.getLogger("digit")

STEPS, LONGEST = 8, 0.5  # steps of an engine that are timed at most, and seconds
_known: dict[str, dict[str, float]] = {}  # of this process, for folders that cannot be written


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
        """The engine in C++, in the making since ``began``; its weights are packed once for every batch size."""
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
    """Choose how ``model`` samples from now on; a DigitError for a quantization that is unknown or slow here."""
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


def measured(
    model: TokenModel, batch: int, guided: bool, quantize: str | None, engines: Mapping[str, Callable[[], DecodeEngine]]
) -> dict[str, float]:
    """Seconds of a step of each of the ``engines``, made one after the other, or as this shape was measured before."""
    shape = shape_class(model, batch, guided, quantize)
    stored, machine = _stored(), _machine()
    here = stored.get(machine, {})
    found = here.get(shape, _known.get(shape, {}))
    if set(found) >= set(engines):
        return found
    found = {name: _seconds(make(), model, guided) for name, make in engines.items()}
    _known[shape] = found
    with contextlib.suppress(DigitError):  # else the next process measures again
        write_json(_file(), {**stored, machine: {**here, shape: found}})
    return found


def shape_class(model: TokenModel, batch: int, guided: bool, quantize: str | None) -> str:
    """What a measurement holds for, in words; rows are rounded up to a power of 2."""
    c, t = model.config, model.config.transformer
    assert t is not None
    rows = 1 << (batch * (2 if guided else 1) - 1).bit_length()
    kind = quantize or str(model.start.dtype).removeprefix("torch.")
    return (
        f"{t.depth} x {t.dim} ({t.heads} heads, feed-forward {t.hidden_dim}), {c.vocab_size} tokens, "
        f"{c.prefix_length + c.length} positions, {kind}, {rows} rows, {torch.get_num_threads()} threads"
    )


def remembered() -> dict[str, dict[str, float]]:
    """Of each shape that was measured on this processor, the seconds of a step by engine."""
    found: dict[str, dict[str, float]] = _stored().get(_machine(), {})
    return found


def _stored() -> dict[str, dict[str, dict[str, float]]]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    """Beside the built C++, whose name changes with its source, the compiler and the processor's instructions."""
    return Path(library()._name).with_suffix(".json")


def _machine() -> str:
    return f"{hardware()['processor']}, torch {torch.__version__}"


@torch.inference_mode()
def _seconds(engine: DecodeEngine, model: TokenModel, guided: bool) -> float:
    """The quickest of a few steps in the middle of a sequence, so that other programs count little."""
    state = engine.state
    length = state.uniform.shape[1]
    params = engine.begin(state.uniform, state.tokens, state.free, [1.0] * length, SamplingParams())
    times: list[float] = []
    while len(times) < 2 or (len(times) <= STEPS and sum(times) < LONGEST):  # the first is slow
        state.place.fill_(length // 2)
        began = time.perf_counter()
        engine.decode_tokens(model, length // 2, length // 2 + 1, guided, params)
        times.append(time.perf_counter() - began)
    return min(times[1:])
