"""What a run writes down: ``metrics.jsonl``, sample pictures, TensorBoard events where that is installed, and Weights &
Biases too where that is installed and the environment variable ``WANDB_PROJECT`` names a project.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from digit.core.errors import DigitError, require
from digit.core.files import write_bytes
from digit.core.images import save_png


class Log:
    """The log of the run in ``out``, from ``step`` on: later lines, of a part that is now done again, are dropped.

    Args:
        out: the run folder.
        step: how many steps are done.
        run: what is trained and how, for Weights & Biases.
    """

    def __init__(self, out: Path, step: int, run: Mapping[str, Any]) -> None:
        self.out, self.path = out, out / "metrics.jsonl"
        kept = [line for line in read_metrics(out) if line["step"] <= step]
        write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._board = _tensorboard(out / "tensorboard", step)
        self._wandb = _wandb(out, run)

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

    def picture(self, step: int, image: Image.Image) -> None:
        """Save a picture as ``samples/step-0000100.png``."""
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

    def __init__(self, sums: Mapping[str, list[float]] | None = None) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {
            name: (total, int(count)) for name, (total, count) in (sums or {}).items()
        }

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count one more value of each."""
        for name, value in metrics.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + value.detach().float(), count + 1

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Plain values from which the constructor goes on exactly."""
        return {name: [float(total), count] for name, (total, count) in self._sums.items()}


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, without a last one that was cut off."""
    path = Path(out) / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def last_metrics(out: str | Path) -> dict[str, Any]:
    """The newest value of every metric of a run."""
    last: dict[str, Any] = {}
    for line in read_metrics(out):
        last.update(line)
    return last


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        module = require("torch.utils.tensorboard", "train", "writing TensorBoard events")
    except DigitError:
        return None
    return module.SummaryWriter(str(folder), purge_step=step + 1)


def _wandb(out: Path, run: Mapping[str, Any]) -> Any:
    """A run of the project that ``WANDB_PROJECT`` names, or None; one that is resumed goes on under the same id."""
    if not os.environ.get("WANDB_PROJECT"):
        return None
    try:
        wandb = require("wandb", "train", "writing to Weights & Biases")
    except DigitError:
        return None
    path = out / "wandb_id.txt"
    if not path.is_file():
        write_bytes(path, uuid.uuid4().hex[:8].encode())
    return wandb.init(dir=str(out), id=path.read_text(), resume="allow", name=out.name, config=dict(run))
