"""Changing given images through their tokens: keep a region and sample the rest, continue from the first rows, vary.

Which tokens are sampled anew is one boolean grid for the prior's tokens and one for the cells of stage 2; the others
stay as they are. A masked model sees the kept tokens on all sides, and so does a random-order prior, which takes them
first: what it samples is conditioned on all that is kept, exactly. Models that sample from left to right are forced to
take a kept token when its turn comes, so what stands before it was drawn without having seen it: borders below and to
the right of a region fit less well than those above and to the left. A feed-forward decoder that makes pixels has no VQ
tokens: it makes the whole image with the noise that suits the given one best, and the pixels of kept cells are then
taken from the given image.

Functions take a model with its tokenizer, the images (B, 3, S, S) in 0..1, a request for them and a
:data:`~digit.pipeline.stage2.Callback`, and give tokens, whose images are ``pipe.to_pixels(tokens)``;
:func:`edit_images` does all of it for files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from digit.core.errors import DigitError
from digit.core.grids import image_grid
from digit.core.images import load_images, save_png, to_pil
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.stage2 import Callback
from digit.pipeline.tokens import Tokens
from digit.sampling.request import SampleRequest
from digit.sampling.rng import uniforms


def edit_region(
    pipe: DigitPipeline, images: Tensor, region: Tensor, request: SampleRequest, callback: Callback | None = None
) -> Tokens:
    """Sample a region anew and keep the rest. The region is (H, W) or (B, H, W) bool, of any resolution; a token is
    sampled when any part of it is in it. Kept pixels go through the VQGAN like all others, if there is one.
    """
    region = region.expand(len(images), *region.shape[-2:])  # (B, S, S)
    if not bool(region.any()):
        raise DigitError("The mask marks nothing to sample anew; expected some white pixels.")
    tokenizer, fine = pipe.prior_tokenizer, pipe.stage2(request.decoder).grid
    rows, columns = tokenizer.grid
    free = cells(region, (rows, columns // tokenizer.depth)).repeat_interleave(tokenizer.depth, 1)  # (B, N)
    return edit_tokens(pipe, images, free, cells(region, fine), request, callback)


def continue_rows(
    pipe: DigitPipeline,
    images: Tensor,
    rows: int,
    request: SampleRequest,
    keep_pixels: bool = False,
    callback: Callback | None = None,
) -> Tokens:
    """Continue images from their first rows of the prior's tokens (the paper's Figure 4b).

    With ``keep_pixels`` the VQ tokens (or pixels) of the same part stay too; otherwise the decoder draws all of them.
    """
    grid, fine = pipe.prior_tokenizer.grid, pipe.stage2(request.decoder).grid
    if not 0 <= rows < grid[0]:
        raise DigitError(
            f"{rows} rows were given to continue from; this model's grid has {grid[0]}, so expected 0 to {grid[0] - 1}."
        )

    def after(kept: int, shape: tuple[int, int]) -> Tensor:
        free = torch.arange(shape[0] * shape[1], device=pipe.device) >= kept * shape[1]
        return free.expand(len(images), -1)

    cells_after = after(rows * fine[0] // grid[0], fine) if keep_pixels else None
    return edit_tokens(pipe, images, after(rows, grid), cells_after, request, callback)


def vary(
    pipe: DigitPipeline, images: Tensor, fraction: float, request: SampleRequest, callback: Callback | None = None
) -> Tokens:
    """Variations: sample a fraction, in (0, 1], of the prior's tokens anew, at places chosen at random for each image;
    a decoder draws all of its tokens.
    """
    if not 0 < fraction <= 1:
        raise DigitError(f"A fraction of {fraction} was given to vary; expected a number above 0 and up to 1.")
    count = pipe.prior_tokenizer.num_tokens
    rank = uniforms(request.seed, request.images, "vary", (count,)).argsort(1).argsort(1)  # (B, N)
    free = (rank < max(1, round(fraction * count))).to(pipe.device)
    return edit_tokens(pipe, images, free, None, request, callback)


@torch.inference_mode()
def edit_tokens(
    pipe: DigitPipeline,
    images: Tensor,
    free: Tensor,
    free_cells: Tensor | None,
    request: SampleRequest,
    callback: Callback | None = None,
) -> Tokens:
    """Tokenize images and sample some of the tokens anew.

    Args:
        pipe, images, request, callback: as for the other functions.
        free: (B, N) bool of the prior's tokens, True where to sample.
        free_cells: (B, M) bool of the cells of stage 2; None for all.
    """
    if not request.params:
        request = request.validate(pipe)
    images = images.to(pipe.device)
    first = pipe.sample_prior(request, pipe.prior_tokenizer.encode(images), free, callback)  # (B, N)
    kept = None if free_cells is None else (images, free_cells)
    return pipe.stage2(request.decoder).sample(first, request, callback, kept)


def cells(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens (B, rows * columns) that a region of pixels (B, H, W) touches."""
    touched: Tensor = F.adaptive_max_pool2d(region[:, None].float(), grid) > 0  # (B, 1, rows, columns)
    return touched.flatten(1)


def edit_images(
    pipe: DigitPipeline,
    files: Sequence[Path],
    pixels: Tensor,
    out: Path,
    num: int,
    request: SampleRequest,
    labels: Sequence[int] | None = None,
    mask: Path | None = None,
    prefix: int | None = None,
    fraction: float | None = None,
) -> Path:
    """Edit each image ``num`` times: ``NAME-0.png`` ... and ``edits.png`` with all beside each other, whose path is
    returned.

    Args:
        pipe, files, pixels, out, num: a model, the images' names and pixels (B, 3, S, S) in 0..1, a folder, and how
            many results an image.
        request: seed, decoder and settings; images and labels follow from the others.
        labels: a class an image, or one for all.
        mask, prefix, fraction: one of them: a file, white where to sample anew; rows of tokens to keep; the share of
            tokens to sample anew.
    """
    classes = None
    if labels is not None:
        if len(labels) not in (1, len(files)):
            raise DigitError(f"{len(labels)} labels were given for {len(files)} images; expected one each, or one.")
        classes = torch.tensor(labels).expand(len(files)).repeat_interleave(num)
    whole = replace(request, images=range(len(files) * num), labels=classes).validate(pipe)
    marked = None if mask is None else load_images(mask, pixels.shape[-1])[0].mean(0) >= 0.5  # (S, S)
    stems, sheet = [file.stem for file in files], []
    for place, stem in enumerate(stems):
        name = stem if stems.count(stem) == 1 else f"{stem}-{place:03d}"  # files of several folders
        given = pixels[place : place + 1].expand(num, -1, -1, -1)  # (num, 3, S, S)
        mine = whole.take(range(place * num, (place + 1) * num))
        if marked is not None:
            tokens = edit_region(pipe, given, marked, mine)
        elif prefix is not None:
            tokens = continue_rows(pipe, given, prefix, mine)
        else:
            assert fraction is not None
            tokens = vary(pipe, given, fraction, mine)
        results = [to_pil(image) for image in pipe.to_pixels(tokens)]
        for index, result in enumerate(results):
            save_png(result, out / f"{name}-{index}.png")
        sheet += [to_pil(pixels[place]), *results]
    return save_png(image_grid(sheet, columns=num + 1), out / "edits.png")
