"""Group norm and SiLU in one go: on a CPU in C++ (``norm.cpp``) where nobody asks for gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digit.native import available, library

LANES = 16  # as in the source


def norm_silu(norm: nn.GroupNorm, x: Tensor, gain: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """``silu(norm(x) * (1 + gain) + offset)``.

    Args:
        norm: with weights.
        x: (B, C, H, W). C++ takes it in float32 or bfloat16, channels last: see :func:`arranged`.
        gain: (B, C), or None for none.
        offset: (B, C), or None for none.

    Returns:
        As x, in its layout.
    """
    if _suits(norm, x) and x.is_contiguous(memory_format=torch.channels_last):
        return _fast(norm, x, gain, offset)
    h = norm(x)
    h = h if gain is None else h * (1 + gain[:, :, None, None])
    h = h if offset is None else h + offset[:, :, None, None]
    return F.silu(h, inplace=not torch.is_grad_enabled())  # h is ours


def arranged(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The input (B, C, H, W) of a network of convolutions and such norms, in the layout in which it is quickest.

    That is channels last where the norms run in C++. Else, on a CPU without gradients, it is the usual one: then
    PyTorch computes all norms on the way, whatever the batch. In training and on GPUs x stays as it is.
    """
    if _suits(norm, x):
        return channels_last(x)
    return x if torch.is_grad_enabled() or x.device.type != "cpu" else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Put x (B, C, H, W) into that layout for certain.

    For a batch of one ``contiguous`` leaves strides as they are that convolutions take for the usual layout.
    """
    _, channels, height, width = x.shape
    strides = (height * width * channels, 1, width * channels, channels)
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _suits(norm: nn.GroupNorm, x: Tensor) -> bool:
    numbers = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    known = numbers and norm.affine and not norm.num_channels % LANES
    return known and not torch.is_grad_enabled() and available() is not None


def _fast(norm: nn.GroupNorm, x: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    images, channels, height, width = x.shape
    y = torch.empty_like(x)  # channels last, too
    # float32, side by side; kept by a name, or their memory would be free before it is read
    numbers = [None if t is None else t.detach().float().contiguous() for t in (norm.weight, norm.bias, gain, offset)]
    pointers = (None if t is None else t.data_ptr() for t in numbers)
    size, threads = (images, height * width, channels, norm.num_groups), max(1, min(torch.get_num_threads(), images))
    half = x.dtype == torch.bfloat16
    library().digit_norm(x.data_ptr(), y.data_ptr(), *size, *pointers, norm.eps, half, threads)
    return y
