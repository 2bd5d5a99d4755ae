"""Checkpoints: ``OUT/checkpoints/step-0000100/``, whole or absent, with everything a run needs to go on exactly.

A folder holds ``modules.safetensors`` (every network), ``optimizers.safetensors``, ``ema.safetensors`` where there is
an average, and ``state.json`` (the step, the run's description and small numbers). Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from digit.core.errors import DigitError
from digit.core.files import read_json, read_tensors, write_folder, write_json, write_tensors

FORMAT = 1
_NAME = re.compile(r"step-(\d{7,})")
# what may change between two parts of a run without making it another run
_FREE = {
    "accumulation", "compile", "fused", "gradient_checkpointing", "workers", "shard", "max_spike",
    "log_every", "validate_every", "checkpoint_every", "sample_every", "keep_checkpoints",
}  # fmt: skip
# fields that earlier releases did not have, and what their runs did
_ADDED = {
    "training.patience": 0,
    "model.init": "normal",
    "model.codebook_depth": 1,
    "objective.dense": 0.0,
    "objective.dense_places": 4,
}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file ("modules", "optimizers", "ema") and name, the run's description, and plain values of the
    loop.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    run: dict[str, Any]
    numbers: dict[str, Any]


def path_of(out: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps of the run in ``out`` stands."""
    return out / "checkpoints" / f"step-{step:07d}"


def save(out: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint of the run in ``out``, then remove all but the newest ``keep``; a DigitError leaves them
    all.
    """
    folder = path_of(out, checkpoint.step)
    if not folder.exists():  # a run that stops where it has just saved
        state = {name: getattr(checkpoint, name) for name in ("step", "run", "numbers")}
        try:
            with write_folder(folder) as aside:
                for name, tensors in checkpoint.tensors.items():
                    write_tensors(aside / f"{name}.safetensors", tensors)
                write_json(aside / "state.json", {"format": FORMAT, **state})
                _flush(aside)
        except DigitError as error:
            last = latest(out)
            kept = (
                f"The last whole checkpoint is {last}; go on from it with --resume." if last else "There is none yet."
            )
            raise DigitError(f"The checkpoint after step {checkpoint.step} was not written. {error} {kept}") from error
        _flush(folder.parent)
    for old in _all(out)[:-keep]:
        shutil.rmtree(old)
    return folder


def latest(out: Path) -> Path | None:
    """The newest checkpoint of the run in ``out``, if there is one."""
    return next(reversed(_all(out)), None)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint; a DigitError where a file is missing or damaged, or it is from a newer release."""
    state = read_json(folder / "state.json")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DigitError(
            f"{folder} is not a checkpoint of format {FORMAT}, the one that this release writes and reads."
        )
    tensors = {path.stem: read_tensors(path) for path in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(state["step"], tensors, state["run"], state["numbers"])


def check_same_run(saved: Mapping[str, Any], given: Mapping[str, Any], where: Path, extend: bool = False) -> None:
    """See that a run goes on as it began; a DigitError names the fields that differ, with both values.

    What only concerns speed, logs or memory may differ, and the length too, unless the schedule depends on it and
    ``extend`` is False.
    """
    free = {f"training.{name}" for name in _FREE}
    if extend or saved.get("training", {}).get("schedule") != "cosine":
        free |= {"training.steps", "training.epochs"}
    new = _flatten(given)
    old = {name: value for name, value in _ADDED.items() if name in new} | _flatten(saved)
    differing = [
        f"{name} is {new.get(name, 'absent')!r}, was {old.get(name, 'absent')!r}"
        for name in sorted((old.keys() | new.keys()) - free)
        if old.get(name) != new.get(name)
    ]
    if differing:
        shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise DigitError(
            f"{where} belongs to another run: {shown}. Give the same settings, or another --out for a new run."
        )


def remove_unfinished(out: Path) -> None:
    """Remove what a killed process left half written."""
    for aside in (out / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(aside)


def _all(out: Path) -> list[Path]:
    found = (path for path in (out / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _flush(folder: Path) -> None:
    """Make names in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
