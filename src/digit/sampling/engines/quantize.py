"""Matrices in 8 bits for the one-token step, which on a CPU at small batches does little but read them.

Each row has one scale (absolute maximum / 127); activations stay in floating point. Tried:
``torch.ops.aten._weight_int8pack_mm``, PyTorch's own kernel, which reads int8 and multiplies in bfloat16. See
docs/performance.md for where it is faster.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.models.token_model import TokenModel


class Int8Linear(nn.Module):
    """A linear layer with ``weight`` (out, in) int8, rounded to nearest, and ``scale`` (out,) bfloat16; row i of the
    matrix is weight[i] * scale[i].
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
    """A copy of the model with int8 matrices in its blocks and head; embeddings, norms and biases are shared, not
    copied.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    narrow = copy.deepcopy(model, shared)
    for module in list(narrow.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return narrow
