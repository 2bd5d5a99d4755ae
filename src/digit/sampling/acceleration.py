"""How fast a model samples: compiled steps, narrow weights, and what is kept for it between calls.

Speed belongs to a loaded model, not to a call: :func:`accelerate` it once, and every later :func:`digit.sampling.sample` uses it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

from digit.errors import DigitError
from digit.models.token_model import TokenModel
from digit.sampling.stepper import Stepper


@dataclass(frozen=True)
class Acceleration:
    """Speed options of a model.

    Attributes:
        compile: build one fused step with torch.compile: half a minute or so for every batch size, then faster steps.
        quantize: "int8" stores the step's matrices in 8 bits, a scale a row; a step on a CPU reads a quarter of the bytes. Tokens change
            slightly.
        cuda_graphs: on a CUDA device, record a step once and replay it without launching its kernels one by one.
    """

    compile: bool = False
    quantize: Literal["int8"] | None = None
    cuda_graphs: bool = True


class Workshop:
    """What is kept for one model: its options, and the stepper of the last batch shape."""

    def __init__(self, options: Acceleration) -> None:
        self.options = options
        self.lock = threading.RLock()  # one batch at a time: the cache is shared between calls
        self.stepper: Stepper | None = None

    def stepper_for(self, model: TokenModel, batch: int, guided: bool) -> Stepper:
        """A stepper with room for the batch: the one at hand if it fits, else a new one in its place."""
        if self.stepper is None or not self.stepper.fits(model, batch, guided):
            if self.stepper is not None and self.stepper.no_compiler:  # do not try again
                self.options = replace(self.options, compile=False)
            self.stepper = None  # the memory of the old one first
            self.stepper = Stepper(model, batch, guided, self.options.compile, self.options.quantize, self.options.cuda_graphs)
        return self.stepper


_workshops: WeakKeyDictionary[TokenModel, Workshop] = WeakKeyDictionary()


def accelerate(
    model: TokenModel, compile: bool = False, quantize: str | None = None, cuda_graphs: bool = True
) -> None:  # fmt: skip
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
    options = Acceleration(compile, "int8" if quantize else None, cuda_graphs)
    if workshop(model).options != options:
        _workshops[model] = Workshop(options)


def workshop(model: TokenModel) -> Workshop:
    """What is kept for a model."""
    if model not in _workshops:
        _workshops[model] = Workshop(Acceleration())
    return _workshops[model]


def release(model: TokenModel) -> None:
    """Free the caches and compiled steps kept for a model; its options stay."""
    workshop(model).stepper = None


def compile_seconds(model: TokenModel) -> float:
    """How long compiling and recording took for the stepper at hand; the first step's time, which no later step needs."""
    stepper = workshop(model).stepper
    return 0.0 if stepper is None else stepper.compile_seconds
