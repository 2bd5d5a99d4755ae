"""The folder of a run of generation: its record, which images are there, and several processes that share it.

``generation.json`` is written first, so that a killed run can go on, and nobody mixes images of other settings into
it. Until the run is complete the hidden folder ``.run`` keeps the tokens of what is done. Processes divide the images
by index and need not talk: whichever finds everything done puts the run together.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from digit.core.errors import DigitError
from digit.core.files import read_json, write_json
from digit.pipeline.tokens import PixelLatents, Tokens, write_arrays

RECORD = "generation.json"


class RunFolder:
    """A folder being filled, made if missing; ``identity`` is what determines the images, and is kept in the record.
    DigitError: it is a file, or holds images of another run and is not to be overwritten.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it reads when it comes back from the file
        # as torchrun and accelerate launch set them
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.path.exists() and not self.path.is_dir():
            raise DigitError(f"--out {path} is a file; expected a folder.")
        if overwrite and self.processes > 1:
            raise DigitError(
                f"--overwrite and several processes do not go together; empty the folder {path} beforehand."
            )
        if overwrite:
            for file in (*self.path.glob("[0-9]*.png"), *(self.path / n for n in ("grid.png", "tokens.npz", RECORD))):
                file.unlink(missing_ok=True)
            shutil.rmtree(self.path / ".run", ignore_errors=True)
        record = self.path / RECORD
        if record.is_file():
            self._compare(read_json(record))
        elif any(self.path.glob("[0-9]*.png")):
            raise DigitError(
                f"The folder {path} holds images and no {RECORD} that says how they were made; choose another --out, "
                "or --overwrite."
            )
        else:
            write_json(record, {**self.identity, "finished": False})
        if self.rank == 0:  # of a process that was killed while it put the run together
            with suppress(OSError):
                (self.path / ".run" / "claimed").rmdir()

    def _compare(self, there: Any) -> None:
        if not isinstance(there, dict):
            raise DigitError(f"{self.path / RECORD} is damaged; choose another --out, or --overwrite.")
        for name, value in self.identity.items():
            if (name == "weights" and isinstance(there.get(name), str)) or (name == "stages" and name not in there):
                continue  # a record of the first edition, with another kind of checksum and without these settings
            if there.get(name) != value:
                raise DigitError(
                    f"The folder {self.path} holds a run with {name} = {there.get(name)!s:.60}; now {value!s:.60} was "
                    "given. Choose another --out, or --overwrite."
                )

    @property
    def finished(self) -> bool:
        """Whether the run is complete and all its images are there."""
        return bool(self.record()["finished"]) and all(self.image(i).is_file() for i in range(self.identity["num"]))

    def record(self) -> dict[str, Any]:
        """What ``generation.json`` holds now."""
        return dict(read_json(self.path / RECORD))

    def image(self, index: int) -> Path:
        """The file of an image."""
        return self.path / f"{index:05d}.png"

    def missing(self, mine: bool = True) -> list[int]:
        """Images not made yet, of this process's share or of all."""
        done = self._done()
        images = range(self.rank, self.identity["num"], self.processes) if mine else range(self.identity["num"])
        return [i for i in images if i not in done or not self.image(i).is_file()]

    def keep(self, images: Sequence[int], tokens: Tokens) -> None:
        """Store the tokens of a batch: before its images, so that an image always has its tokens."""
        noise = None if tokens.latents is None else tokens.latents.noise
        arrays = {"semantic": tokens.semantic, "vq": tokens.vq, "images": torch.as_tensor(list(images)), "noise": noise}
        tag = zlib.crc32(repr(list(images)).encode())
        write_arrays(self.path / ".run" / f"{images[0]:09d}-{tag:08x}.npz", arrays)

    def tokens(self) -> Tokens:
        """The tokens of all images, in order, without their labels."""
        rows = self._done()
        order = [rows[i] for i in range(self.identity["num"])]
        names = [name for name in ("semantic", "vq", "noise") if all(name in row for row in order)]
        arrays = {name: torch.from_numpy(np.stack([row[name] for row in order])) for name in names}
        noise = arrays.pop("noise", None)
        latents = None if noise is None else PixelLatents(self.identity["decoder"], noise)
        return replace(Tokens.of({name: grid.long() for name, grid in arrays.items()}), latents=latents)

    def _done(self) -> dict[int, dict[str, np.ndarray]]:
        """Tokens by image, of every batch kept so far."""
        rows: dict[int, dict[str, np.ndarray]] = {}
        for file in sorted((self.path / ".run").glob("*.npz")):
            if file.name.startswith("."):  # being written
                continue
            with np.load(file, allow_pickle=False) as arrays:
                grids = {name: arrays[name] for name in arrays.files}
            for place, image in enumerate(grids.pop("images").tolist()):
                rows[image] = {name: grid[place] for name, grid in grids.items()}
        return rows

    def claim(self) -> bool:
        """True for one process alone: the first that asks when nothing is missing."""
        if self.missing(mine=False):
            return False
        with suppress(FileExistsError, FileNotFoundError):
            (self.path / ".run" / "claimed").mkdir()
            return True
        return False

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Complete the record and drop what was kept aside."""
        record = {**self.identity, **results, "finished": True}
        write_json(self.path / RECORD, record)
        shutil.rmtree(self.path / ".run", ignore_errors=True)
        return record
