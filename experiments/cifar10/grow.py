"""A larger feed-forward decoder that makes the same images: further blocks whose last layers begin at zero.

    python experiments/cifar10/grow.py src/digit/packaged/cifar10/decoder/onepass --depth 5 --blocks 2 --out runs/grown

``digit train decoder --from runs/grown`` goes on from it. Source: Chen et al. 2016, arXiv 1511.05641 (Net2Net: a
larger network that begins as the function of a smaller one).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from digit.models.feedforward import FeedForwardDecoder

LAST = ("attention.out.weight", "attention.out.bias", "ffn_out.weight", "ffn_out.bias", "conv2.weight")


def grow(decoder: FeedForwardDecoder, depth: int, blocks: int) -> FeedForwardDecoder:
    """``decoder`` with so many blocks of its transformer, and residual blocks a side of its head."""
    old = decoder.config
    if old.pixels is None or depth < old.transformer.depth or blocks < old.pixels.blocks:
        raise SystemExit(f"A decoder of pixels can have more blocks, not fewer; this one: {old.describe()}.")
    transformer, pixels = replace(old.transformer, depth=depth), replace(old.pixels, blocks=blocks)
    grown = FeedForwardDecoder(replace(old, transformer=transformer, pixels=pixels))
    new = grown.load_state_dict(decoder.state_dict(), strict=False).missing_keys
    for name, values in grown.named_parameters():
        if name in new and name.endswith(LAST):
            torch.nn.init.zeros_(values)
    return grown


def main() -> None:
    """Grow a saved decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    decoder = FeedForwardDecoder.from_pretrained(options.decoder)
    grown = grow(decoder, options.depth, options.blocks)
    grown.provenance = {**decoder.provenance, "grown": {"depth": options.depth, "blocks": options.blocks}}
    grown.save_pretrained(options.out)
    print(f"{grown.config.describe()}: {sum(p.numel() for p in grown.parameters()):,} parameters, in {options.out}")


if __name__ == "__main__":
    main()
