"""Which engine steps quicker on this processor, measured at the first use of a shape and remembered.

The compiler, the processor and the shape decide together whether the C++ step or the matrix library of PyTorch is
quicker, and no rule of ours would stay true. A measurement takes a few steps; what it found lies beside the built C++.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from digit.core.environment import hardware
from digit.core.errors import DigitError
from digit.core.files import write_json
from digit.models.token_model import TokenModel
from digit.native import library
from digit.sampling.engines.decode import DecodeEngine
from digit.sampling.request import SamplingParams

STEPS, LONGEST = 8, 0.5  # steps of an engine that are timed at most, and seconds
_known: dict[str, dict[str, float]] = {}  # of this process, for folders that cannot be written


def measured(
    model: TokenModel, batch: int, guided: bool, quantize: str | None, engines: Mapping[str, Callable[[], DecodeEngine]]
) -> dict[str, float]:
    """Seconds of a step of each of the ``engines``, which are made one after the other, for such batches: ``batch``
    rows, or twice as many when ``guided``. From memory where this shape was measured before.
    """
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
