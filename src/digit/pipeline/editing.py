"""Changing given pictures through their tokens: keep a region and sample the rest, continue from the first rows, vary.

Which tokens are sampled anew is one boolean grid for the semantic tokens and one for the VQ tokens; the others stay as
they are. A masked decoder sees the kept VQ tokens on all sides. Models that sample from left to right are forced to
take a kept token when its
turn comes, so what stands before it was drawn without having seen it: borders below and to the right of a region fit
    less well than
those above and to the left. A one-pass decoder that goes straight to pixels has no VQ tokens: it paints the whole
picture with the noise that suits the given one best, and the pixels of kept cells are then taken from the given
picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.errors import DigitError
from digit.models.feedforward import OnePassDecoder, PixelHeadConfig
from digit.pipeline.pipeline import DigitPipeline, Tokens, for_stage
from digit.sampling.engine import sample
from digit.sampling.feedforward import noise
from digit.sampling.rng import uniforms

FITTED = 16
"""Noise vectors that a one-pass decoder tries, to meet the colours of the pixels that are kept."""


def edit_region(pipe: DigitPipeline, images: Tensor, region: Tensor, **options: Any) -> Tokens:
    """Sample a region anew and keep the rest.

    Args:
        pipe: a model with its encoder, codebook and VQGAN.
        images: (B, 3, S, S) in 0..1.
        region: (S, S) or (B, S, S) bool, True where to sample; a token is sampled when any of its pixels is.
        options: see :func:`edit_tokens`.

    Returns:
        Tokens; their pictures are ``pipe.to_pixels(tokens)``. Kept pixels go through the VQGAN like all others, if
        there is one.
    """
    region = region.expand(len(images), *region.shape[-2:])  # (B, S, S)
    if not bool(region.any()):
        raise DigitError("The mask marks nothing to sample anew; expected some white pixels.")
    semantic = None if pipe.space == "vq" else cells(region, pipe.tokenizer.grid)
    return edit_tokens(pipe, images, semantic, cells(region, pixel_grid(pipe, options.get("decoder"))), **options)


def continue_rows(pipe: DigitPipeline, images: Tensor, rows: int, keep_pixels: bool = False, **options: Any) -> Tokens:
    """Continue pictures from their first rows of tokens (the paper's Figure 4b).

    Args:
        pipe: see :func:`edit_region`.
        images: (B, 3, S, S) in 0..1.
        rows: of semantic tokens that are kept, 0 <= rows < rows of the grid.
        keep_pixels: keep the VQ tokens (or pixels) of the same part too; otherwise the decoder draws all of them from
            the semantic tokens.
        options: see :func:`edit_tokens`.
    """
    fine = pixel_grid(pipe, options.get("decoder"))
    grid = fine if pipe.space == "vq" else pipe.tokenizer.grid
    if not 0 <= rows < grid[0]:
        raise DigitError(
            f"{rows} rows were given to continue from; this model's grid has {grid[0]}, so expected 0 to {grid[0] - 1}."
        )
    first = torch.arange(grid[0] * grid[1], device=pipe.device) < rows * grid[1]  # (N,)
    free = (~first).expand(len(images), -1)
    if pipe.space == "vq":
        return edit_tokens(pipe, images, None, free, **options)
    kept = rows * fine[0] // grid[0] * fine[1] if keep_pixels else 0
    free_vq = (torch.arange(fine[0] * fine[1], device=pipe.device) >= kept).expand(len(images), -1)
    return edit_tokens(pipe, images, free, free_vq, **options)


def vary(
    pipe: DigitPipeline,
    images: Tensor,
    fraction: float,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Tokens:
    """Variations: sample a fraction of the tokens anew, at places chosen at random for each picture.

    Args:
        pipe: see :func:`edit_region`.
        images: (B, 3, S, S) in 0..1.
        fraction: of the semantic tokens, in (0, 1]; all VQ tokens are drawn from them. A baseline in VQ space varies VQ
            tokens.
        numbers: (B,) of the pictures within the run; each number is another variation.
        seed: of the run.
        options: see :func:`edit_tokens`.
    """
    if not 0 < fraction <= 1:
        raise DigitError(f"A fraction of {fraction} was given to vary; expected a number above 0 and up to 1.")
    numbers = range(len(images)) if numbers is None else numbers
    fine = pixel_grid(pipe, options.get("decoder"))
    count = fine[0] * fine[1] if pipe.space == "vq" else pipe.tokenizer.num_tokens
    rank = uniforms(seed, numbers, "vary", (count,)).argsort(1).argsort(1)  # (B, N)
    free = (rank < max(1, round(fraction * count))).to(pipe.device)
    if pipe.space == "vq":
        return edit_tokens(pipe, images, None, free, numbers, seed, **options)
    everything = torch.ones(len(images), fine[0] * fine[1], dtype=torch.bool, device=pipe.device)
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
        vq: (B, M) bool, of the VQ tokens; or of the cells of :func:`pixel_grid`.
        numbers: (B,) of the pictures within the run; with ``seed`` they determine the random numbers.
        seed: of the run.
        labels: (B,) classes or -1.
        decoder: its kind; None takes the default.
        callback: see :meth:`DigitPipeline.sample_tokens`.
        settings: sampling settings, see :meth:`DigitPipeline.__call__`.
    """
    numbers = range(len(images)) if numbers is None else numbers
    images = images.to(pipe.device)
    prior = pipe.part("prior")
    chosen, later = pipe.settings_for("prior", settings, labels is not None)
    on_prior = for_stage("prior", callback)
    if semantic is None:
        before = pipe.part("vqgan").encode(images)  # (B, M)
        return Tokens(None, sample(prior, numbers, seed, chosen, labels, given=before, mask=vq, callback=on_prior))
    given = pipe.tokenizer.encode(images)
    meaning = sample(prior, numbers, seed, chosen, labels, given=given, mask=semantic, callback=on_prior)  # (B, N)
    kind = pipe.pick_decoder(decoder)
    if pipe.paints(kind):
        return _painted(
            pipe, pipe.complete(meaning, numbers, seed, kind, labels, **later), images, given, vq, numbers, seed
        )
    chosen, _ = pipe.settings_for(kind, later)
    on_step = for_stage(kind, callback)
    decoding, before = pipe.decoders[kind], pipe.part("vqgan").encode(images)
    return Tokens(
        meaning, sample(decoding, numbers, seed, chosen, prefix=meaning, given=before, mask=vq, callback=on_step)
    )


def pixel_grid(pipe: DigitPipeline, decoder: str | None = None) -> tuple[int, int]:
    """(rows, columns) of the cells in which pixels are kept or made anew: VQ tokens, or semantic ones where there are
    no others.
    """
    grid: tuple[int, int] = pipe.tokenizer.grid if pipe.paints(decoder) else pipe.part("vqgan").config.grid
    return grid


def _painted(
    pipe: DigitPipeline, tokens: Tokens, images: Tensor, given: Tensor, anew: Tensor, numbers: Sequence[int], seed: int
) -> Tokens:
    """Keep the pixels of the cells (B, N) that are not made anew, and choose the noise that gives the picture their
    colours.
    """
    paint = tokens.paint
    if paint is None or bool(anew.all()):
        return tokens
    model = cast(OnePassDecoder, pipe.decoders[paint.decoder])
    side = cast(PixelHeadConfig, model.config.pixels).resolution
    if images.shape[-1] != side:  # the decoder enlarges
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    free = anew.view(-1, 1, *model.config.grid).float()  # (B, 1, rows, columns)
    free = F.interpolate(free, images.shape[-2:], mode="nearest") > 0  # (B, 1, S, S)
    candidates = [noise(model.config, numbers, seed, stage=f"onepass-{i}").to(model.start) for i in range(FITTED)]
    errors = []
    for candidate in candidates:
        rebuilt = pipe.to_pixels(Tokens(given, None, replace(paint, noise=candidate)))
        errors.append(((rebuilt - images).square() * ~free).sum((1, 2, 3)))  # (B,)
    best = torch.stack(errors).argmin(0)  # (B,)
    own = torch.stack(candidates)[best, torch.arange(len(images), device=best.device)]  # (B, noise_dim)
    return replace(tokens, paint=replace(paint, noise=own, kept=images, anew=free))


def cells(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens (B, rows * columns) that a region of pixels (B, H, W) touches."""
    touched: Tensor = F.adaptive_max_pool2d(region[:, None].float(), grid) > 0  # (B, 1, rows, columns)
    return touched.flatten(1)
