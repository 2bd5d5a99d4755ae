"""A run of generation into a folder: numbered PNG files, a grid, and a record of how they were made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from digit.core.batching import PROBE, Batcher
from digit.core.environment import hardware
from digit.core.errors import DigitError
from digit.core.grids import picture_grid
from digit.core.images import save_png, to_pil
from digit.core.progress import bar
from digit.models.token_model import TokenModel
from digit.pipeline.pipeline import DigitPipeline, Tokens
from digit.pipeline.runfolder import RunFolder, weights_digest, write_arrays
from digit.sampling.engine import check_request
from digit.sampling.engines.acceleration import accelerate, compile_seconds, engine, release

GRID_PICTURES = 64
GRID_CLASSES = 16  # as many rows; of more classes the pictures stay in order
WRITERS = 4
DECODED_AT_ONCE = 8
WORTH_COMPILING = 120.0
"""Seconds of sampling still to do from which compiling, which takes half a minute, pays for itself."""


def generate_folder(
    pipe: DigitPipeline,
    out: str | Path,
    num: int,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    decoder: str | None = None,
    batch_size: int | None = None,
    save_tokens: bool = False,
    compile: bool | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Generate ``num`` pictures into a folder.

    Writes ``00000.png`` ..., ``grid.png`` (the first 64, a row for each class where they are few), ``generation.json``
    and, if asked, ``tokens.npz``. PNG files are compressed by worker threads while the next batch is sampled. A run
    that was killed goes on where it was when it is called again. Under torchrun or accelerate launch every process
    makes its share of the pictures, and the last one to finish completes the folder.

    Args:
        pipe: the model.
        out: the folder; made if missing.
        num: how many pictures.
        labels: classes that the pictures take in turns; None: every class in turns for a class-conditional model.
        seed: of the run.
        decoder: its kind; None takes the model's default.
        batch_size: how many at a time, by default as many as memory holds; does not change the pictures.
        save_tokens: also write the semantic and VQ tokens.
        compile: True compiles the sampling steps, False runs them in plain PyTorch. None takes the C++ step on a CPU,
            and compiles where that does not run and enough work is left after the first batch.
        quantize: "int8" for narrow weights on a CPU; see :func:`digit.sampling.engines.acceleration.accelerate`.
        overwrite: begin anew where the folder holds another run.
        settings: sampling settings, see :meth:`DigitPipeline.__call__`.

    Returns:
        What ``generation.json`` holds: settings, seconds, images/s and the checksum of all tokens; "finished" is False
            when other
        processes are still at work.

    Raises:
        DigitError: the folder holds pictures of another run.
    """
    if labels is None and pipe.num_classes:
        labels = range(pipe.num_classes)
    count, classes = pipe.expand_labels(labels if labels is None else list(labels), num)
    _check(pipe, classes, decoder, settings)
    identity = {
        "model": pipe.name,
        "weights": weights_digest(pipe),
        "num": count,
        "labels": None if labels is None else list(labels),
        "seed": seed,
        "decoder": None if pipe.space == "vq" else pipe.pick_decoder(decoder),
        "settings": {k: v for k, v in settings.items() if v is not None},
        "dtype": str(next(pipe.part("prior").parameters()).dtype).removeprefix("torch."),
        "quantize": quantize,
    }
    run = RunFolder(out, identity, overwrite)
    if run.finished and (run.path / "tokens.npz").is_file() >= save_tokens:
        return {**run.record(), "made": 0}
    started = time.perf_counter()
    todo = _Todo(pipe, run, classes, compile, quantize)
    with ThreadPoolExecutor(WRITERS) as writers:
        size = todo.make(batch_size, writers, lambda i, part: pipe.sample_tokens(i, part, seed, decoder, **settings))
    seconds = time.perf_counter() - started
    results = {
        "batch_size": size,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "processes": run.processes,
        "made": todo.made,
        "seconds": round(seconds, 3),
        "engine": todo.engine(),
        "compile_seconds": round(sum(compile_seconds(m) for m in todo.models), 3),
        "images_per_second": round(todo.made / seconds, 3),
    }
    return _complete(run, results, classes if save_tokens else None, save_tokens, pipe.class_names)


def _check(pipe: DigitPipeline, classes: torch.Tensor | None, decoder: str | None, settings: dict[str, Any]) -> None:
    """Refuse what cannot be sampled before a folder is made for it."""
    chosen, later = pipe.settings_for("prior", settings, classes is not None)
    check_request(pipe.part("prior"), chosen, classes)
    pipe.check_pixels(decoder)
    if pipe.space == "semantic":
        kind = pipe.pick_decoder(decoder)
        check_request(pipe.decoders[kind], pipe.settings_for(kind, later)[0], None)


class _Todo:
    """The pictures that this process still has to make."""

    def __init__(
        self,
        pipe: DigitPipeline,
        run: RunFolder,
        classes: torch.Tensor | None,
        compile: bool | None,
        quantize: str | None,
    ) -> None:
        self.pipe, self.run, self.classes = pipe, run, classes
        self.compile, self.quantize = compile, quantize
        self.models = [m for m in (pipe.prior, *pipe.decoders.values()) if isinstance(m, TokenModel)]
        self.made = 0

    def make(self, batch_size: int | None, writers: ThreadPoolExecutor, sample: Callable[..., Tokens]) -> int:
        """Make them; the batch size that was used."""
        missing = self.run.missing()
        batcher = Batcher(self.pipe.device, batch_size, self._release)
        # the batch that is measured has a size of its own, which is not worth compiling for
        self._accelerate(bool(self.compile) and (batch_size is not None or len(missing) <= PROBE))
        writing: list[Future[Path]] = []

        def work(images: Sequence[int]) -> None:
            tokens = sample(images, None if self.classes is None else self.classes[list(images)])
            pixels = _to_host(_pixels(self.pipe, tokens))
            self.run.keep(images, tokens)
            writing.extend(writers.submit(_write, pixels, n, self.run.picture(i)) for n, i in enumerate(images))

        began = time.perf_counter()
        with bar("Generating", len(missing), show=self.run.rank == 0) as progress:
            for done in batcher.run(missing, work):
                if not self.made:  # after the first batch it is known how long the rest takes
                    left = (time.perf_counter() - began) / done * (len(missing) - done)
                    self._accelerate(left > WORTH_COMPILING if self.compile is None else self.compile)
                self.made += done
                progress.advance(done)
            for job in writing:
                job.result()
        return batcher.size or len(missing)

    def _release(self) -> None:
        for model in self.models:
            release(model)

    def _accelerate(self, compile: bool) -> None:
        for model in self.models:
            accelerate(model, compile, self.quantize, native=self.compile is not False)

    def engine(self) -> str:
        """Which step sampled; of several models, of each in turn where they differ."""
        return ", ".join(dict.fromkeys(filter(None, map(engine, self.models))))


def _pixels(pipe: DigitPipeline, tokens: Tokens) -> torch.Tensor:
    """Decode (B, 3, S, S), always ``DECODED_AT_ONCE`` together: convolutions round differently for other batch sizes.

    On a GPU the VQGAN computes in the number format of the prior; its weights stay in float32.
    """
    dtype = next(pipe.part("prior").parameters()).dtype
    narrow = pipe.device.type == "cuda" and dtype != torch.float32
    parts = []
    for start in range(0, len(tokens), DECODED_AT_ONCE):
        rows = torch.arange(start, start + DECODED_AT_ONCE).clamp(max=len(tokens) - 1)
        with torch.autocast(pipe.device.type, dtype, enabled=narrow):
            parts.append(pipe.to_pixels(tokens.take(rows))[: len(tokens) - start])
    return torch.cat(parts)


def _to_host(pixels: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Begin copying pictures off the device; the copy, and an event to wait for before it is read."""
    if pixels.device.type != "cuda":
        return pixels.cpu(), None
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    host.copy_(pixels, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


def _write(pixels: tuple[torch.Tensor, Any], place: int, path: Path) -> Path:
    images, event = pixels
    if event is not None:
        event.synchronize()
    return save_png(to_pil(images[place]), path)


def _grid(run: RunFolder, names: Sequence[str]) -> Image.Image:
    """The first pictures; where they are of a few classes with names, a row of each class."""
    first = [Image.open(run.picture(i)) for i in range(min(GRID_PICTURES, run.identity["num"]))]
    labels = run.identity["labels"]
    if not names or not labels or len(set(labels)) > GRID_CLASSES:
        return picture_grid(first)
    rows: dict[int, list[Image.Image]] = {}
    for index, picture in enumerate(first):
        rows.setdefault(labels[index % len(labels)], []).append(picture)
    columns = max(map(len, rows.values()))
    blank = Image.new("RGB", first[0].size, "white")
    cells = [picture for row in rows.values() for picture in (*row, *[blank] * (columns - len(row)))]
    return picture_grid(cells, columns, row_titles=["no class" if label < 0 else names[label] for label in rows])


def _complete(
    run: RunFolder, results: dict[str, Any], labels: torch.Tensor | None, save_tokens: bool, names: Sequence[str]
) -> dict[str, Any]:
    """Put the run together, if nothing is missing and no other process does."""
    if not run.claim():
        return {**run.identity, **results, "finished": False}
    tokens = run.tokens()
    save_png(_grid(run, names), run.path / "grid.png")
    if save_tokens:
        save_tokens_file(run.path / "tokens.npz", tokens, labels)
    return run.finish({**results, "tokens_sha256": tokens.sha256()})


def save_tokens_file(path: str | Path, tokens: Tokens, labels: torch.Tensor | None = None) -> Path:
    """Write token grids (and labels) as a compressed ``.npz`` of plain integer arrays: ``semantic``, ``vq``,
    ``labels``.
    """
    return write_arrays(Path(path), {"semantic": tokens.semantic, "vq": tokens.vq, "labels": labels})


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
