"""The figures of the page on concepts, made by the package's own parts from a real model and real photographs.

python docs/figures/concepts.py MODEL DATA [--split test] [--out docs/images/concepts]

Each function is one figure; nothing in them is drawn by hand.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from digit import DigitPipeline
from digit.clustering.patches import Atlas, build_atlas
from digit.core.files import write_bytes
from digit.core.grids import image_grid, token_image
from digit.core.images import save_png, to_pil, to_tensor
from digit.data.dataset import ImageDataset, open_dataset
from digit.evaluation.metrics.noise import Change, NoiseModel, apply_change
from digit.evaluation.metrics.stability import NOISE, stability
from digit.evaluation.model_source import image_batches, open_images
from digit.pipeline.pipeline import Tokens
from digit.sampling import SampleRequest

SIZE = 128  # pixels of a picture in a figure
PHOTOGRAPHS = 4
"""Photographs that a figure shows."""
LEVELS = (30.0, 20.0, 10.0, 5.0)
"""Noise, in dB of signal to noise."""
MEASURED, ATLAS_IMAGES = 256, 1024
"""Images that shares of changed tokens are measured on, and that patches are taken from."""


def enlarged(image: Tensor) -> Image.Image:
    """An image (3, S, S) without smoothing."""
    return to_pil(image).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def tokens_of(pipe: DigitPipeline, images: Tensor) -> dict[str, tuple[Tensor, tuple[int, int], int]]:
    """Tokens (B, N), grid and vocabulary of both kinds."""
    with torch.inference_mode():
        semantic, vq = pipe.tokenizer.encode(images), pipe.part("vqgan").encode(images)
    config = pipe.part("vqgan").config
    return {
        "semantic tokens": (semantic, pipe.tokenizer.grid, pipe.tokenizer.vocab_size),
        "VQ tokens": (vq, config.grid, config.codes),
    }


def with_flips(tokens: Tensor, before: Tensor, grid: tuple[int, int], vocabulary: int) -> Image.Image:
    """Tokens as colours; those that differ from ``before`` keep theirs, the others fade."""
    picture = token_image(tokens, grid, vocabulary, SIZE)
    same = (tokens == before).reshape(grid).numpy()
    veil = Image.fromarray(np.where(same, 215, 0).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture, veil)


def captioned(rows: list[tuple[str, list[Image.Image]]], heads: list[str]) -> Image.Image:
    """Rows of pictures with a title each, and a heading above every column."""
    sheet = image_grid([p for _, row in rows for p in row], len(heads), 1, [title for title, _ in rows])
    left = sheet.width - len(heads) * (SIZE + 2) + 2
    page = Image.new("RGB", (sheet.width + 16, sheet.height + 40), "white")
    page.paste(sheet, (8, 32))
    font, pen = ImageFont.load_default(size=15), ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        pen.text((8 + left + column * (SIZE + 2) + SIZE // 2, 18), head, "black", font, anchor="mm")
    return page


def noise(pipe: DigitPipeline, images: Tensor, out: Path) -> None:
    """One photograph under growing noise, and which of its tokens are others than before."""
    before = tokens_of(pipe, images[:1])
    changed = [images[:1], *(apply_change(images[:1], Change(kind="noise", level=level), [0]) for level in LEVELS)]
    rows = [("photograph", [enlarged(image[0]) for image in changed])]
    for name, (clean, grid, vocabulary) in before.items():
        after = [tokens_of(pipe, image)[name][0][0] for image in changed]
        cells = [token_image(clean[0], grid, vocabulary, SIZE)]
        rows.append((name, cells + [with_flips(tokens, clean[0], grid, vocabulary) for tokens in after[1:]]))
    save_png(captioned(rows, ["as it is", *(f"{level:g} dB" for level in LEVELS)]), out / "noise.png")


def shares(pipe: DigitPipeline, dataset: ImageDataset, out: Path) -> None:
    """The share of tokens that noise changes, over many photographs: the plot of digit evaluate stability."""
    with tempfile.TemporaryDirectory() as aside:
        stability(pipe, dataset, NOISE, NoiseModel()).save(aside)
        write_bytes(out / "shares.png", (Path(aside) / "stability.png").read_bytes())


def clusters(pipe: DigitPipeline, dataset: ImageDataset, out: Path) -> None:
    """What some clusters look like: for each, the patches of different photographs that are nearest to its centroid."""
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "patches.safetensors"
        batches = (batch.images for batch in image_batches(dataset, pipe.image_size, 64))
        counts = build_atlas(pipe.tokenizer, batches, path)
        atlas = Atlas(path, pipe.tokenizer)
        full = np.flatnonzero(counts == counts.max())
        chosen = full[np.linspace(0, len(full) - 1, 10).round().astype(int)]
        cells = [Image.fromarray(patch) for cluster in chosen for patch in atlas.patches(int(cluster))]
    sheet = image_grid(cells, int(counts.max()), scale=4, row_titles=[f"cluster {cluster}" for cluster in chosen])
    save_png(sheet, out / "clusters.png")


def sampling(pipe: DigitPipeline, out: Path, seed: int = 1) -> None:
    """Pictures coming into being: semantic tokens one by one, and what the decoder makes of them."""
    count, grid, vocabulary = PHOTOGRAPHS, pipe.tokenizer.grid, pipe.tokenizer.vocab_size
    labels = torch.arange(count) * max(1, pipe.num_classes // count) % pipe.num_classes if pipe.num_classes else None
    tokens = pipe.sample_tokens(SampleRequest(range(count), seed, labels))
    assert tokens.semantic is not None
    total = tokens.semantic.shape[1]
    moments = [total // 8, total // 3, 2 * total // 3, total]
    pixels = pipe.to_pixels(tokens)
    rows = []
    for row in range(count):
        cells = []
        for done in moments:
            picture = token_image(tokens.semantic[row], grid, vocabulary, SIZE)
            blank = (torch.arange(total) >= done).reshape(grid).numpy()
            veil = Image.fromarray(np.where(blank, 255, 0).astype(np.uint8)).resize(
                (SIZE, SIZE), Image.Resampling.NEAREST
            )
            cells.append(Image.composite(Image.new("RGB", picture.size, "#e8e8e8"), picture, veil))
        title = pipe.class_names[int(labels[row])] if labels is not None and pipe.class_names else f"picture {row}"
        rows.append((title, [*cells, enlarged(pixels[row])]))
    save_png(captioned(rows, [*(f"{done} tokens" for done in moments), "decoded"]), out / "sampling.png")


def path(pipe: DigitPipeline, images: Tensor, out: Path) -> None:
    """Photographs through the model and back."""
    kinds = tokens_of(pipe, images)
    semantic = kinds["semantic tokens"][0]
    vq = kinds["VQ tokens"][0]
    columns = {
        "photograph": [enlarged(image) for image in images],
        **{name: [token_image(row, grid, v, SIZE) for row in tokens] for name, (tokens, grid, v) in kinds.items()},
        "VQGAN alone": [enlarged(image) for image in pipe.to_pixels(Tokens(None, vq))],
        "whole path": [enlarged(image) for image in pipe.decode(semantic)],
    }
    rows = [("", [column[row] for column in columns.values()]) for row in range(len(images))]
    save_png(captioned(rows, list(columns)), out / "path.png")


def main() -> None:
    """Make all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--split", default="test", help="photographs that no part was trained on")
    parser.add_argument("--out", type=Path, default=Path("docs/images/concepts"))
    parser.add_argument("--num", type=int, default=MEASURED, help="images that the shares are measured on")
    given = parser.parse_args()
    pipe = DigitPipeline.from_pretrained(given.model)
    dataset = open_dataset(given.data, given.split)
    images = torch.stack([to_tensor(dataset[i].image) for i in range(PHOTOGRAPHS)])  # (B, 3, S, S)
    given.out.mkdir(parents=True, exist_ok=True)
    path(pipe, images, given.out)
    noise(pipe, images, given.out)
    shares(pipe, open_images(given.data, given.split, min(given.num, len(dataset))), given.out)
    clusters(pipe, open_images(given.data, given.split, min(ATLAS_IMAGES, len(dataset))), given.out)
    sampling(pipe, given.out)


if __name__ == "__main__":
    main()
