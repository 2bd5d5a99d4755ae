"""How fast a model samples: which step runs, narrow weights, and what is kept for it between calls.

| device | step |
|---|---|
| CPU | the C++ step (:mod:`digit.sampling.engines.native`), where there is a compiler for it and it covers the model |
| CPU otherwise | the step compiled by torch.compile if asked for, else the plain one |
| CUDA | the same, recorded as CUDA graphs |
| others | compiled if asked for, else plain |

Speed belongs to a loaded model, not to a call: :func:`accelerate` it once, and every later
    :func:`digit.sampling.sample` uses it.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

from digit.core.errors import DigitError
from digit.models.token_model import TokenModel
from digit.native import NoCompiler, library
from digit.sampling.engines.native import NativeStep, suits
from digit.sampling.engines.stepper import Stepper, version

log = logging.getLogger("digit")


@dataclass(frozen=True)
class Acceleration:
    """Speed options of a model.

    Attributes:
        compile: build one fused step with torch.compile where the C++ step does not run: half a minute or so for every
            batch size.
        quantize: "int8" stores the step's matrices in 8 bits, a scale a row; a step on a CPU reads a quarter of the
            bytes. Tokens change slightly.
        cuda_graphs: on a CUDA device, record a step once and replay it without launching its kernels one by one.
        native: on a CPU, run the C++ step where it can: a few seconds of building once for all models and times.
    """

    compile: bool = False
    quantize: Literal["int8"] | None = None
    cuda_graphs: bool = True
    native: bool = True


class Workshop:
    """What is kept for one model: its options, its packed weights, and the stepper of the last batch shape."""

    def __init__(self, options: Acceleration) -> None:
        self.options = options
        self.lock = threading.RLock()  # one batch at a time: the cache is shared between calls
        self.stepper: Stepper | None = None
        self._native: tuple[object, NativeStep] | None = None  # and the version of the weights in it
        self._build_seconds = 0.0

    def stepper_for(self, model: TokenModel, batch: int, guided: bool) -> Stepper:
        """A stepper with room for the batch: the one at hand if it fits, else a new one in its place."""
        if self.stepper is None or not self.stepper.fits(model, batch, guided):
            if self.stepper is not None and self.stepper.no_compiler:  # do not try again
                self.options = replace(self.options, compile=False)
            self.stepper = None  # the memory of the old one first
            o, native = self.options, self._native_for(model)
            self.stepper = Stepper(model, batch, guided, o.compile, o.quantize, o.cuda_graphs, native)
            self.stepper.compile_seconds, self._build_seconds = self._build_seconds, 0.0
        return self.stepper

    def release(self) -> None:
        """Free all but the options."""
        self.stepper = self._native = None

    def _native_for(self, model: TokenModel) -> NativeStep | None:
        """The C++ step if it may and can run; weights are packed once, for every batch size."""
        if not self.options.native or not suits(model):
            return None
        if self._native is None or self._native[0] != version(model):
            self._native = None
            began = time.perf_counter()
            try:
                library()
                self._build_seconds = time.perf_counter() - began
                self._native = version(model), NativeStep(model, self.options.quantize)
            except NoCompiler as reason:
                log.info("The C++ step could not be built, so a slower one runs: %s.", reason)
                self.options = replace(self.options, native=False)
                return None
        return self._native[1]


_workshops: WeakKeyDictionary[TokenModel, Workshop] = WeakKeyDictionary()


def accelerate(
    model: TokenModel, compile: bool = False, quantize: str | None = None, cuda_graphs: bool = True, native: bool = True
) -> None:
    """Choose how ``model`` samples from now on; see :class:`Acceleration`.

    Raises:
        DigitError: an unknown kind of quantization, or one that this device has no fast kernel for.
    """
    if quantize not in (None, "int8"):
        raise DigitError(f"quantize = {quantize} was given; expected int8, or nothing.")
    if quantize and model.start.device.type != "cpu":
        raise DigitError(
            f"quantize = {quantize} was given for {model.start.device.type}; int8 is for the CPU. Use --dtype bf16."
        )
    options = Acceleration(compile, "int8" if quantize else None, cuda_graphs, native)
    if workshop(model).options != options:
        _workshops[model] = Workshop(options)


def workshop(model: TokenModel) -> Workshop:
    """What is kept for a model."""
    if model not in _workshops:
        _workshops[model] = Workshop(Acceleration())
    return _workshops[model]


def release(model: TokenModel) -> None:
    """Free the caches, packed weights and compiled steps kept for a model; its options stay."""
    workshop(model).release()


def compile_seconds(model: TokenModel) -> float:
    """How long compiling and recording took for the stepper at hand; the first step's time, which no later step
    needs.
    """
    stepper = workshop(model).stepper
    return 0.0 if stepper is None else stepper.compile_seconds


def engine(model: TokenModel) -> str:
    """Which step the model last sampled with: "C++", "compiled" or "plain" (on CUDA as graphs); "" if it has not."""
    stepper = workshop(model).stepper
    if stepper is None:
        return ""
    if stepper.native:
        return "C++"
    return ("compiled" if stepper.compiled else "plain") + (" as CUDA graphs" if stepper.graphs else "")
