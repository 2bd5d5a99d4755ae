"""What a run writes down: ``metrics.jsonl``, sample images, TensorBoard events where that is installed, and Weights &
Biases too where that is installed and the environment variable ``WANDB_PROJECT`` names a project.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from digit.core.errors import DigitError, MissingPackageError, require
from digit.core.files import write_bytes
from digit.core.images import save_png


class Log:
    """The log of the run in ``out``, from ``step`` on: later lines, of a part that is now done again, are dropped."""

    def __init__(self, out: Path, step: int, description: Mapping[str, Any]) -> None:
        self.out, self.path = out, out / "metrics.jsonl"
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board = self._wandb = None
        try:
            tensorboard = require("torch.utils.tensorboard", "train", "writing TensorBoard events")
            self._board = tensorboard.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
            if os.environ.get("WANDB_PROJECT"):
                # a run that is resumed goes on under the same id
                path = out / "wandb_id.txt"
                if not path.is_file():
                    write_bytes(path, uuid.uuid4().hex[:8].encode())
                wandb = require("wandb", "train", "writing to Weights & Biases")
                about = {"name": out.name, "config": dict(description)}
                self._wandb = wandb.init(dir=str(out), id=path.read_text(), resume="allow", **about)
        except MissingPackageError:
            pass

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line ``{"step": step, NAME: value, ...}``."""
        line = {"step": step} | {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DigitError(f"Cannot write {self.path}: {error.strerror}.") from error
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def image(self, step: int, image: Image.Image) -> None:
        """Save an image as ``samples/step-0000100.png``."""
        save_png(image, self.out / "samples" / f"step-{step:07d}.png")
        if self._board is not None:
            self._board.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            wandb = require("wandb", "train", "writing to Weights & Biases")
            self._wandb.log({"samples": wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Flush."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class Averages:
    """Running means of () tensors, kept on their device so that adding one waits for nothing."""

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None, device: torch.device | None = None) -> None:
        """Begin anew, or go on exactly from what :meth:`state` gave."""
        saved = (state or {}).items()
        self._sums = {name: (torch.tensor(total, device=device), int(count)) for name, (total, count) in saved}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count one more value of each."""
        for name, value in metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach().float(), count + 1

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: total / count for name, (total, count) in self.state().items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, tuple[float, int]]:
        """The sums and counts so far, in one transfer from the device."""
        if not self._sums:
            return {}
        totals = torch.stack([total for total, _ in self._sums.values()]).tolist()
        return {name: (total, count) for total, (name, (_, count)) in zip(totals, self._sums.items(), strict=True)}


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, without a last one that was cut off."""
    path = Path(out) / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def last_metrics(out: str | Path) -> dict[str, Any]:
    """The newest value of every metric of a run."""
    return {name: value for line in read_metrics(out) for name, value in line.items()}
