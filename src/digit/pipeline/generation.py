"""A run of generation into a folder: numbered PNG files, a grid, and a record of how they were made."""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from digit.core.config import to_dict
from digit.core.environment import hardware, versions
from digit.core.errors import DigitError
from digit.core.grids import image_grid
from digit.core.images import save_png, to_pil
from digit.core.progress import bar, track
from digit.models.component import weights_checksum
from digit.models.token_model import TokenModel
from digit.pipeline.image_array import write_image_array
from digit.pipeline.pipeline import DigitPipeline
from digit.pipeline.runfolder import RunFolder
from digit.pipeline.tokens import Tokens, save_tokens_file
from digit.sampling.batching import PROBE, Batcher, decoded_at_once
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine_name, release
from digit.sampling.request import SampleRequest
from digit.sampling.rng import uniforms

GRID_IMAGES = 64
GRID_CLASSES = 16  # as many rows; of more classes the images stay in order
DEFAULT_IMAGES = 64
WRITERS = 4
WORTH_COMPILING = 120.0
"""Seconds of sampling still to do from which compiling, which takes half a minute, pays for itself."""


def generate_folder(
    pipe: DigitPipeline,
    out: str | Path,
    num: int | None = None,
    labels: Sequence[int | str] | str | None = None,
    seed: int = 0,
    decoder: str | None = None,
    batch_size: int | None = None,
    save_tokens: bool = False,
    compile: bool | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    labels_per_class: int | None = None,
    npz: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Generate ``num`` images into a folder.

    Writes ``00000.png`` ..., ``grid.png`` (the first 64, a row for each class where they are few), ``generation.json``
    and, if asked, ``tokens.npz``. A run that was killed goes on where it was when it is called again. Under torchrun or
    accelerate launch every process makes its share of the images, and the last one to finish completes the folder.

    Args:
        pipe, out: the model, and the folder, made if missing.
        num, labels, labels_per_class: see :func:`run_labels`.
        seed, decoder, settings: see :class:`~digit.sampling.request.SampleRequest`.
        batch_size: how many at a time, by default as many as memory holds; does not change the images.
        save_tokens: also write the semantic and VQ tokens.
        compile: True compiles the sampling steps, False runs them in plain PyTorch. None takes the C++ step on a CPU,
            and compiles where that does not run and enough work is left after the first batch.
        quantize: "int8" for narrow weights on a CPU; see :func:`digit.sampling.engines.acceleration.accelerate`.
        overwrite: begin anew where the folder holds another run.
        npz: also pack the images into this file, one array of all (:mod:`digit.pipeline.image_array`).

    Returns:
        What ``generation.json`` holds: what was asked for, the effective settings of every stage ("stages"), the
        command, date, versions, machine and engine, seconds, images/s, and the checksum of all tokens; "finished" is
        False when other processes are still at work.

    Raises:
        DigitError: the folder holds images of another run, or ``npz`` ends otherwise; or see :func:`run_labels` and
            :meth:`~digit.sampling.request.SampleRequest.validate`.
    """
    if npz is not None and Path(npz).suffix != ".npz":
        raise DigitError(f"--npz {npz} was given; expected the name of a file that ends in .npz.")
    numbers = labels if labels is None or isinstance(labels, str) else pipe.class_numbers(labels)
    chosen, num, labelling = run_labels(pipe.num_classes, num, numbers, labels_per_class, seed)
    request = SampleRequest.of_run(num, chosen, seed, decoder, settings).validate(pipe)
    sampled_by = {place: part for place, part in pipe.components.items() if place not in ("encoder", "codebook")}
    identity = {
        "model": pipe.name,
        "weights": {place: weights_checksum(part)[:16] for place, part in sampled_by.items()},
        "num": len(request),
        "labels": "random" if labels == "random" else chosen,
        "seed": seed,
        "decoder": request.decoder,
        "settings": dict(request.settings),
        "stages": {stage: to_dict(params) for stage, params in request.params.items()},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "quantize": quantize,
    }
    run = RunFolder(out, identity, overwrite)
    if run.finished and (run.path / "tokens.npz").is_file() >= save_tokens:
        _pack(run, npz)
        return {**run.record(), "made": 0}
    started = time.perf_counter()
    size, made = _make(pipe, run, request, batch_size, compile, quantize)
    seconds = time.perf_counter() - started
    (program, *words), models = sys.argv, _token_models(pipe)
    results = {
        "command": shlex.join(["digit" if Path(program).name == "__main__.py" else Path(program).name, *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "labelling": labelling,
        "batch_size": size,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "processes": run.processes,
        "made": made,
        "seconds": round(seconds, 3),
        "engine": ", ".join(dict.fromkeys(filter(None, map(engine_name, models)))),
        "compile_seconds": round(sum(map(compile_seconds, models)), 3),
        "images_per_second": round(made / seconds, 3),
    }
    if not run.claim():
        return {**run.identity, **results, "finished": False}
    tokens = replace(run.tokens(), labels=request.labels)
    save_png(_grid(run, chosen, pipe.class_names), run.path / "grid.png")
    if save_tokens:
        save_tokens_file(run.path / "tokens.npz", tokens)
    record = run.finish({**results, "tokens_sha256": tokens.sha256()})
    _pack(run, npz)
    return record


def run_labels(
    classes: int,
    num: int | None = None,
    labels: Sequence[int] | str | None = None,
    per_class: int | None = None,
    seed: int = 0,
) -> tuple[list[int] | None, int, str]:
    """The labels that the images of a run take in turns, how many images there are, and the labels in words.

    Args:
        classes: of the model, 0 for none.
        num: how many images; by default 64, or what ``per_class`` makes.
        labels: classes, -1 for none; "random" draws one for each image, from the seed and the image's number; None: all
            classes where the model has any.
        per_class: so many images of each class.

    Raises:
        DigitError: random or balanced labels without classes, or numbers that contradict each other.
    """
    if (labels == "random" or per_class is not None) and not classes:
        raise DigitError("Random labels and --labels-per-class need a class-conditional model; this has no classes.")
    if labels == "random":
        if per_class is not None:
            raise DigitError("--labels random and --labels-per-class exclude each other; give one.")
        num = num or DEFAULT_IMAGES
        drawn = uniforms(seed, range(num), "labels", (1,)).flatten()  # (num,)
        return (drawn * classes).long().clamp(max=classes - 1).tolist(), num, "random"
    chosen = [int(label) for label in labels] if labels is not None else list(range(classes)) if classes else None
    if per_class is None:
        what = "none" if chosen is None else "all in turns" if labels is None else "in turns"
        return chosen, num or DEFAULT_IMAGES, what
    total = per_class * len(chosen or ())
    if num not in (None, total):
        raise DigitError(f"--num {num} and --labels-per-class {per_class} make {total}; leave --num out.")
    return chosen, total, f"balanced, {per_class:,} a class"


def _pack(run: RunFolder, npz: str | Path | None) -> None:
    """Write the finished run's images as one array, reading them one by one."""
    if npz is None:
        return
    record = run.record()
    about = {name: record.get(name) for name in ("model", "num", "labelling", "seed", "decoder", "settings")}
    files = track((run.image(i) for i in range(record["num"])), f"Packing {Path(npz).name}", record["num"])
    write_image_array(npz, (np.asarray(Image.open(file).convert("RGB")) for file in files), record["num"], about)


def _make(
    pipe: DigitPipeline,
    run: RunFolder,
    request: SampleRequest,
    size: int | None,
    compile: bool | None,
    bits: str | None,
) -> tuple[int, int]:
    """Make the images of this process's share that are missing: how many at a time, and how many in all. They are
    compressed by threads while the next are sampled.
    """
    missing, made, models = run.missing(), 0, _token_models(pipe)
    writing: list[Future[Path]] = []

    def speed_up(compile_now: bool) -> None:
        for model in models:
            accelerate(model, compile_now, bits, native=False if compile is False else None)

    def write(image: torch.Tensor, index: int) -> Path:
        return save_png(to_pil(image), run.image(index))

    def work(images: Sequence[int]) -> None:
        tokens = pipe.sample_tokens(request.take(images))
        pixels = _pixels(pipe, tokens).cpu()
        run.keep(images, tokens)
        writing.extend(writers.submit(write, image, i) for i, image in zip(images, pixels, strict=True))

    # the batch that is measured has a size of its own, which is not worth compiling for
    speed_up(bool(compile) and (size is not None or len(missing) <= PROBE))
    batcher = Batcher(pipe.device, size, lambda: release(*models))
    began = time.perf_counter()
    with ThreadPoolExecutor(WRITERS) as writers, bar("Generating", len(missing), show=run.rank == 0) as progress:
        for done in batcher.run(missing, work):
            if not made:  # after the first batch it is known how long the rest takes
                left = (time.perf_counter() - began) / done * (len(missing) - done)
                speed_up(left > WORTH_COMPILING if compile is None else compile)
            made += done
            progress.advance(done)
        for job in writing:
            job.result()
    return batcher.size or len(missing), made


def _token_models(pipe: DigitPipeline) -> list[TokenModel]:
    return [part for part in pipe.components.values() if isinstance(part, TokenModel)]


def _pixels(pipe: DigitPipeline, tokens: Tokens) -> torch.Tensor:
    """Decode (B, 3, S, S), always as many together: convolutions round differently for other batch sizes.

    On a GPU the VQGAN computes in the number format of the prior; its weights stay in float32.
    """
    narrow = pipe.device.type == "cuda" and pipe.dtype != torch.float32
    parts, together = [], decoded_at_once(pipe.image_size)
    for start in range(0, len(tokens), together):
        rows = torch.arange(start, start + together).clamp(max=len(tokens) - 1)
        with torch.autocast(pipe.device.type, pipe.dtype, enabled=narrow):
            parts.append(pipe.to_pixels(tokens.take(rows))[: len(tokens) - start])
    return torch.cat(parts)


def _grid(run: RunFolder, labels: Sequence[int] | None, names: Sequence[str]) -> Image.Image:
    """The first images; where they are of a few classes with names, a row of each class."""
    first = [Image.open(run.image(i)) for i in range(min(GRID_IMAGES, run.identity["num"]))]
    if not names or not labels or len(set(labels)) > GRID_CLASSES:
        return image_grid(first)
    rows = defaultdict(list)
    for image, label in zip(first, itertools.cycle(labels), strict=False):
        rows[label].append(image)
    columns = max(map(len, rows.values()))
    blank = Image.new("RGB", first[0].size, "white")
    cells = [image for row in rows.values() for image in (*row, *[blank] * (columns - len(row)))]
    return image_grid(cells, columns, row_titles=["no class" if label < 0 else names[label] for label in rows])
