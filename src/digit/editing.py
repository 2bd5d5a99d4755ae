"""Changing given pictures through their tokens: keep a region and sample the rest, continue from the first rows, vary.

Which tokens are sampled anew is one boolean grid for the semantic tokens and one for the VQ tokens; the others stay as they are. A
masked decoder sees the kept VQ tokens on all sides. Models that sample from left to right are forced to take a kept token when its
turn comes, so what stands before it was drawn without having seen it: borders below and to the right of a region fit less well than
those above and to the left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.errors import DigitError
from digit.pipeline import DigitPipeline, Tokens, for_stage
from digit.sampling.engine import sample
from digit.sampling.seeding import uniforms


def edit_region(pipe: DigitPipeline, images: Tensor, region: Tensor, **options: Any) -> Tokens:
    """Sample a region anew and keep the rest.

    Args:
        pipe: a model with its encoder, codebook and VQGAN.
        images: (B, 3, S, S) in 0..1.
        region: (S, S) or (B, S, S) bool, True where to sample; a token is sampled when any of its pixels is.
        options: see :func:`edit_tokens`.

    Returns:
        Tokens; their pictures are ``pipe.to_pixels(tokens)``. Kept pixels go through the VQGAN like all others.
    """
    region = region.expand(len(images), *region.shape[-2:])  # (B, S, S)
    if not bool(region.any()):
        raise DigitError("The mask marks nothing to sample anew; expected some white pixels.")
    semantic = None if pipe.space == "vq" else cells(region, pipe.tokenizer.grid)
    return edit_tokens(pipe, images, semantic, cells(region, pipe.part("vqgan").config.grid), **options)


def continue_rows(pipe: DigitPipeline, images: Tensor, rows: int, keep_pixels: bool = False, **options: Any) -> Tokens:
    """Continue pictures from their first rows of tokens (the paper's Figure 4b).

    Args:
        pipe: see :func:`edit_region`.
        images: (B, 3, S, S) in 0..1.
        rows: of semantic tokens that are kept, 0 <= rows < rows of the grid.
        keep_pixels: keep the VQ tokens of the same part too; otherwise the decoder draws all of them from the semantic tokens.
        options: see :func:`edit_tokens`.
    """
    vqgan_grid = pipe.part("vqgan").config.grid
    grid = vqgan_grid if pipe.space == "vq" else pipe.tokenizer.grid
    if not 0 <= rows < grid[0]:
        raise DigitError(
            f"{rows} rows were given to continue from; this model's grid has {grid[0]}, so expected 0 to {grid[0] - 1}."
        )
    first = torch.arange(grid[0] * grid[1], device=pipe.device) < rows * grid[1]  # (N,)
    free = (~first).expand(len(images), -1)
    if pipe.space == "vq":
        return edit_tokens(pipe, images, None, free, **options)
    kept = rows * vqgan_grid[0] // grid[0] * vqgan_grid[1] if keep_pixels else 0
    free_vq = (torch.arange(vqgan_grid[0] * vqgan_grid[1], device=pipe.device) >= kept).expand(len(images), -1)
    return edit_tokens(pipe, images, free, free_vq, **options)


def vary(
    pipe: DigitPipeline, images: Tensor, fraction: float, numbers: Sequence[int] | None = None, seed: int = 0, **options: Any
) -> Tokens:
    """Variations: sample a fraction of the tokens anew, at places chosen at random for each picture.

    Args:
        pipe: see :func:`edit_region`.
        images: (B, 3, S, S) in 0..1.
        fraction: of the semantic tokens, in (0, 1]; all VQ tokens are drawn from them. A baseline in VQ space varies VQ tokens.
        numbers: (B,) of the pictures within the run; each number is another variation.
        seed: of the run.
        options: see :func:`edit_tokens`.
    """
    if not 0 < fraction <= 1:
        raise DigitError(f"A fraction of {fraction} was given to vary; expected a number above 0 and up to 1.")
    numbers = range(len(images)) if numbers is None else numbers
    vqgan = pipe.part("vqgan")
    count = vqgan.num_tokens if pipe.space == "vq" else pipe.tokenizer.num_tokens
    rank = uniforms(seed, numbers, "vary", (count,)).argsort(1).argsort(1)  # (B, N)
    free = (rank < max(1, round(fraction * count))).to(pipe.device)
    if pipe.space == "vq":
        return edit_tokens(pipe, images, None, free, numbers, seed, **options)
    everything = torch.ones(len(images), vqgan.num_tokens, dtype=torch.bool, device=pipe.device)
    return edit_tokens(pipe, images, free, everything, numbers, seed, **options)


@torch.inference_mode()
def edit_tokens(
    pipe: DigitPipeline,
    images: Tensor,
    semantic: Tensor | None,
    vq: Tensor,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    decoder: str | None = None,
    callback: Callable[[str, int, Tensor], None] | None = None,
    **settings: Any,
) -> Tokens:
    """Tokenize pictures and sample some of the tokens anew.

    Args:
        pipe: see :func:`edit_region`.
        images: (B, 3, S, S) in 0..1.
        semantic: (B, N) bool, True where to sample; None for a baseline in VQ space.
        vq: (B, M) bool.
        numbers: (B,) of the pictures within the run; with ``seed`` they determine the random numbers.
        seed: of the run.
        labels: (B,) classes or -1.
        decoder: its kind; None takes the default.
        callback: see :meth:`DigitPipeline.sample_tokens`.
        settings: sampling settings, see :meth:`DigitPipeline.__call__`.
    """
    numbers = range(len(images)) if numbers is None else numbers
    images = images.to(pipe.device)
    before = pipe.part("vqgan").encode(images)  # (B, M)
    prior = pipe.part("prior")
    chosen, later = pipe.settings_for("prior", settings, labels is not None)
    on_prior = for_stage("prior", callback)
    if semantic is None:
        return Tokens(None, sample(prior, numbers, seed, chosen, labels, given=before, mask=vq, callback=on_prior))
    given = pipe.tokenizer.encode(images)
    meaning = sample(prior, numbers, seed, chosen, labels, given=given, mask=semantic, callback=on_prior)  # (B, N)
    kind = pipe.pick_decoder(decoder)
    chosen, _ = pipe.settings_for(kind, later)
    on_step = for_stage(kind, callback)
    decoding = pipe.decoders[kind]
    return Tokens(meaning, sample(decoding, numbers, seed, chosen, prefix=meaning, given=before, mask=vq, callback=on_step))


def cells(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens (B, rows * columns) that a region of pixels (B, H, W) touches."""
    touched: Tensor = F.adaptive_max_pool2d(region[:, None].float(), grid) > 0  # (B, 1, rows, columns)
    return touched.flatten(1)
