"""Pictures beside what becomes of them: image, semantic tokens as colours, VQGAN alone, full path."""

from __future__ import annotations

from PIL import Image
from torch import Tensor, inference_mode

from digit.core.grids import picture_grid, token_picture
from digit.core.images import to_pil
from digit.pipeline.pipeline import DigitPipeline, Tokens


@inference_mode()
def reconstruction_sheet(
    pipe: DigitPipeline, images: Tensor, seed: int = 0, decoder: str | None = None
) -> tuple[Image.Image, list[Image.Image]]:
    """Reconstruct pictures and lay each out in a row.

    Args:
        pipe: a model with all its parts; a baseline in VQ space has no column of semantic tokens and no full path, a
            model without a VQGAN no column of that.
        images: (B, 3, S, S) in 0..1.
        seed: of the decoder's sampling.
        decoder: its kind.

    Returns:
        The sheet, one row a picture, and the reconstructions alone.
    """
    images = images.to(pipe.device)
    size = images.shape[-1]
    columns = [[to_pil(image) for image in images]]
    if pipe.space == "semantic":
        tokens = pipe.tokenizer.encode(images)  # (B, N)
        grid, vocab = pipe.tokenizer.grid, pipe.tokenizer.vocab_size
        columns.append([token_picture(row, grid, vocab, size) for row in tokens])
    if pipe.vqgan is not None or not pipe.paints(decoder):
        vqgan = pipe.part("vqgan")
        columns.append([to_pil(image) for image in pipe.to_pixels(Tokens(None, vqgan.encode(images)))])
    if pipe.space == "semantic":
        columns.append([to_pil(image) for image in pipe.decode(tokens, seed, decoder)])
    cells = [column[row] for row in range(len(images)) for column in columns]
    return picture_grid(cells, columns=len(columns)), columns[-1]
