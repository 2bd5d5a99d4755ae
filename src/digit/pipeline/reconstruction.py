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
    columns = {"image": list(map(to_pil, images))}
    if pipe.encoder is not None and pipe.codebook is not None:
        tokenizer, size = pipe.tokenizer, images.shape[-1]
        tokens = tokenizer.encode(images)  # (B, N)
        drawn = [token_image(row, tokenizer.grid, tokenizer.vocab_size, size) for row in tokens]
        columns["semantic\ntokens"] = drawn
    if pipe.vqgan is not None:
        columns["VQGAN\nalone"] = list(map(to_pil, pipe.to_pixels(Tokens(vq=pipe.vqgan.encode(images)))))
    if pipe.decoders:
        title = f"{pipe.pick_decoder(decoder)}\ndecoder"
        columns[title] = list(map(to_pil, pipe.reconstruct(images, seed, decoder)))
    rows = zip(*columns.values(), strict=True)
    cells = [image for row in rows for image in row]
    return image_grid(cells, columns=len(columns), column_titles=[*columns]), [*columns.values()][-1]
