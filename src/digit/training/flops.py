"""How much arithmetic a step of training is, and how much the machine could do: the two halves of MFU.

MFU, model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): the multiplications and additions
that the model's matrix products need, over what the processors could do in that time. Recomputed activations do not
count as work.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn

from digit.models.token_model import TokenModel, TokenModelConfig

# FLOP/s of dense bf16 and fp16 products, from the makers' data sheets; the first name that a device's name contains
# counts
_SHEETS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "L4": 121e12,
}


def forward_flops(config: TokenModelConfig) -> int:
    """FLOPs of one image's forward pass in training; a multiplication and an addition are two.

    Matrix products only. Causal attention is counted as the half that is needed.
    """
    shape = config.transformer
    dim, ffn = shape.dim, shape.ffn_dim or 4 * shape.dim
    # a causal model is not shown the last token, a masked one sees the start position too
    positions = config.prefix_length + config.length + (0 if shape.causal else 1)
    attention = 4 * positions * dim // (2 if shape.causal else 1)
    block = 8 * dim * dim + 4 * dim * ffn + attention
    return positions * shape.depth * block + config.length * 2 * dim * config.vocab_size


def token_model_in(networks: nn.Module) -> TokenModel | None:
    """The token model among networks; of others the FLOPs are not counted."""
    return next((module for module in networks.modules() if isinstance(module, TokenModel)), None)


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that a device can do: from the maker's data sheet for 16 bits on known GPUs, else measured with a product
    of matrices.
    """
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
        _finish(device)
        start = time.perf_counter()
        a @ a
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
