"""Images beside what becomes of them: image, semantic tokens as colours, VQGAN alone, full path."""

from __future__ import annotations

from PIL import Image
from torch import Tensor, inference_mode

from digit.core.grids import image_grid, token_image
from digit.core.images import to_pil
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.tokens import Tokens


@inference_mode()
def reconstruction_sheet(
    pipe: DigitPipeline, images: Tensor, seed: int = 0, decoder: str | None = None
) -> tuple[Image.Image, list[Image.Image]]:
    """Reconstruct images (B, 3, S, S) in 0..1: a sheet with one row per image and a title above each
    column, and the reconstructions alone.

    A model without a VQGAN has no column of that; a baseline in VQ space has no column of semantic tokens.
    """
    images = images.to(pipe.device)
    pipe.stage2(decoder).check_parts()
    columns = [images]
    if pipe.vqgan is not None:
        columns.append(pipe.to_pixels(Tokens(vq=pipe.vqgan.encode(images))))
    drawn = [[to_pil(image) for image in column] for column in columns]
    titles = ["image", "VQGAN\nalone"][: len(columns)]
    if pipe.encoder is not None and pipe.codebook is not None:
        tokenizer, size = pipe.tokenizer, images.shape[-1]
        tokens = tokenizer.encode(images)  # (B, N)
        titles.insert(1, "semantic\ntokens")
        drawn.insert(1, [token_image(row, tokenizer.grid, tokenizer.vocab_size, size) for row in tokens])
    if pipe.decoders:
        titles.append(f"{pipe.pick_decoder(decoder)}\ndecoder")
        drawn.append([to_pil(image) for image in pipe.reconstruct(images, seed, decoder)])
    cells = [column[row] for row in range(len(images)) for column in drawn]
    return image_grid(cells, columns=len(drawn), column_titles=titles), drawn[-1]
