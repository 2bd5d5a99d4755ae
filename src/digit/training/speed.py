"""How fast a run is: examples and tokens a second, memory, and MFU.

MFU, model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the multiplications and additions
that the model's matrix products need, over what the processors could do in that time. Recomputed activations do not
count as work.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from digit.core.devices import bf16_is_fast
from digit.models.token_config import TokenModelConfig
from digit.models.token_model import TokenModel
from digit.training.config import TrainingConfig

log = logging.getLogger("digit")

SPEED = ("examples_per_second", "tokens_per_second", "mfu", "memory_gib")
"""Metrics that say how fast, not how well: two equal runs differ in them."""
# FLOP/s of dense 16-bit products, from the makers' data sheets; the first name that a device's name contains counts
_SHEETS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "L4": 121e12,
}


class Meter:
    """Speed and memory of a run of ``networks`` on ``device``, whose work ``world`` processes share."""

    def __init__(self, networks: nn.Module, device: torch.device, precision: str, world: int) -> None:
        self._model = token_model_in(networks)
        self._device, self._precision, self._world = device, precision, world

    def read(self, examples_per_second: float) -> dict[str, float]:
        """``examples_per_second``, for token models ``tokens_per_second`` and ``mfu`` (0 to 1), and ``memory_gib``."""
        found = {"examples_per_second": examples_per_second, "memory_gib": peak_memory(self._device) / 2**30}
        if self._model is not None:
            # the backward pass is two products for each of the forward pass
            needed = 3 * forward_flops(self._model.config) * examples_per_second
            found["tokens_per_second"] = examples_per_second * self._model.config.length
            found["mfu"] = needed / (self._world * peak_flops(self._device, self._precision))
        return found


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, of the GPU or of this process, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forward_flops(config: TokenModelConfig) -> int:
    """FLOPs of the matrix products of one image's forward pass in training; causal attention counts half."""
    # a causal model is not shown the last token, a masked one sees the start position too, a random-order one is told
    # the place of each token
    shown = config.length * (2 if config.role == "random" else 1) + (1 if config.role == "masked" else 0)
    head = config.length * 2 * config.backbone.dim * config.vocab_size
    return config.backbone.flops(config.prefix_length + shown) + head


def token_model_in(networks: nn.Module) -> TokenModel | None:
    """The token model among networks; of others the FLOPs are not counted."""
    return next((module for module in networks.modules() if isinstance(module, TokenModel)), None)


def with_precision(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """The same with the precision that "auto" means on ``device``; warns where bfloat16 was asked for and is slow."""
    fast = bf16_is_fast(device)
    if config.precision == "auto":
        return replace(config, precision="bf16" if fast else "no")
    if config.precision == "bf16" and not fast:
        half, single = (measured_flops(device, dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
        log.warning(
            "training.precision is bf16, for which this processor has no instructions: it multiplies matrices at %.1f "
            "GFLOP/s in bfloat16 and %.1f in float32. Use --set training.precision=auto.", half, single,
        )  # fmt: skip
    return config


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that a device can do: the maker's figure for 16 bits on known GPUs, else measured."""
    if device.type == "cuda" and precision != "no":
        name = torch.cuda.get_device_name(device)
        for known, flops in _SHEETS.items():
            if known in name:
                return flops
    return measured_flops(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))


@cache
def measured_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """The best FLOP/s of a few square matrix products, on as many threads as torch has now."""
    size = 512 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first is slow
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
