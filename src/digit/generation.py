"""A run of generation into a folder: numbered PNG files, a grid, and a record of how they were made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from digit.data.images import save_png, to_pil
from digit.errors import DigitError
from digit.files import write_file, write_json
from digit.pipeline import DigitPipeline, Tokens
from digit.progress import bar
from digit.visual import picture_grid

GRID_PICTURES = 64


def generate_folder(
    pipe: DigitPipeline,
    out: str | Path,
    num: int,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    decoder: str | None = None,
    batch_size: int | None = None,
    save_tokens: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Generate ``num`` pictures into a folder.

    Writes ``00000.png`` ..., ``grid.png`` (the first 64), ``generation.json`` and, if asked, ``tokens.npz``. PNG files are compressed by
    worker threads while the next batch is sampled.

    Args:
        pipe: the model.
        out: the folder; made if missing.
        num: how many pictures.
        labels: classes that the pictures take in turns; None: every class in turns for a class-conditional model.
        seed: of the run.
        decoder: its kind; None takes the model's default.
        batch_size: how many at a time; does not change the pictures.
        save_tokens: also write the semantic and VQ tokens.
        settings: sampling settings, see :meth:`DigitPipeline.__call__`.

    Returns:
        What ``generation.json`` holds: settings, seconds, images/s and the checksum of all tokens.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DigitError(f"--out {out} is a file; expected a folder.")
    if labels is None and pipe.num_classes:
        labels = range(pipe.num_classes)
    count, classes = pipe.expand_labels(labels if labels is None else list(labels), num)
    size = min(batch_size or 64, count)
    started = time.perf_counter()
    parts: list[Tokens] = []
    first: list[Image.Image] = []
    with ThreadPoolExecutor(4) as writers, bar("Generating", count) as progress:
        writing = []
        for start in range(0, count, size):
            images = range(start, min(start + size, count))
            tokens = pipe.sample_tokens(
                images, None if classes is None else classes[start : start + size], seed, decoder, **settings
            )
            pictures = [to_pil(image) for image in pipe.to_pixels(tokens)]
            parts.append(tokens)
            first += pictures[: GRID_PICTURES - len(first)]
            writing += [writers.submit(save_png, p, out / f"{i:05d}.png") for i, p in zip(images, pictures, strict=True)]
            progress.advance(len(pictures))
        for job in writing:
            job.result()
    seconds = time.perf_counter() - started
    tokens = _join(parts)
    save_png(picture_grid(first), out / "grid.png")
    if save_tokens:
        save_tokens_file(out / "tokens.npz", tokens, classes)
    record = {
        "model": pipe.name,
        "num": count,
        "labels": None if labels is None else list(labels),
        "seed": seed,
        "decoder": None if pipe.space == "vq" else pipe.pick_decoder(decoder),
        "settings": {k: v for k, v in settings.items() if v is not None},
        "batch_size": size,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 3),
        "images_per_second": round(count / seconds, 3),
        "tokens_sha256": tokens.sha256(),
    }
    write_json(out / "generation.json", record)
    return record


def _join(parts: Sequence[Tokens]) -> Tokens:
    semantic = [p.semantic.cpu() for p in parts if p.semantic is not None]
    vq = [p.vq.cpu() for p in parts if p.vq is not None]
    return Tokens(torch.cat(semantic) if semantic else None, torch.cat(vq) if vq else None)


def save_tokens_file(path: str | Path, tokens: Tokens, labels: torch.Tensor | None = None) -> Path:
    """Write token grids (and labels) as a compressed ``.npz`` of plain integer arrays: ``semantic``, ``vq``, ``labels``."""
    import numpy as np

    grids = {"semantic": tokens.semantic, "vq": tokens.vq, "labels": labels}
    arrays = {name: grid.cpu().numpy().astype(np.int32) for name, grid in grids.items() if grid is not None}

    def write(aside: Path) -> None:
        with open(aside, "wb") as handle:
            np.savez_compressed(handle, **arrays)

    return write_file(path, write)


def load_tokens_file(path: str | Path) -> Tokens:
    """Read what :func:`save_tokens_file` wrote.

    Raises:
        DigitError: no such file, or not integer grids.
    """
    import zipfile

    import numpy as np

    if not Path(path).is_file():
        raise DigitError(f"There is no token file {path}.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            grids = {n: torch.from_numpy(arrays[n].astype(np.int64)) for n in ("semantic", "vq") if n in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise DigitError(f"{path} is not a token file (.npz of integer grids): {error}.") from error
    if not grids:
        raise DigitError(f"{path} holds neither 'semantic' nor 'vq' tokens.")
    return Tokens(grids.get("semantic"), grids.get("vq"))
