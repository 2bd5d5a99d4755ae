"""Attention in training, forward and backward, by number format and number of positions.

    python benchmarks/attention.py [--threads 1]

Seconds of process time, the least of five, for 64 images, 4 heads of 32 channels: what a training of the CIFAR-10
presets does in each block. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
import torch.nn.functional as F

BATCH, HEADS, WIDTH = 64, 4, 32


def seconds(positions: int, dtype: torch.dtype, causal: bool, repeats: int = 5) -> tuple[float, float]:
    """Of the forward and of the backward pass."""
    shape = (BATCH, positions, 3, HEADS, WIDTH)
    q, k, v = (part.requires_grad_() for part in torch.randn(shape, dtype=dtype).permute(2, 0, 3, 1, 4))
    gradient = torch.randn(BATCH, positions, HEADS, WIDTH, dtype=dtype).transpose(1, 2)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        middle = time.process_time()
        torch.autograd.grad(out, (q, k, v), gradient)
        times.append((middle - began, time.process_time() - middle))
    return min(times, key=sum)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    found = []
    print(f"{'positions':>9}  {'format':<9}{'forward, s':>12}{'backward, s':>13}")
    for positions, causal in ((64, False), (256, True), (320, True)):
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            forward, backward = seconds(positions, dtype, causal)
            print(f"{positions:>9}  {name:<9}{forward:>12.4f}{backward:>13.4f}")
            found.append({"positions": positions, "format": name, "forward": forward, "backward": backward})
    print(json.dumps({"threads": torch.get_num_threads(), "attention": found}))


if __name__ == "__main__":
    main()
